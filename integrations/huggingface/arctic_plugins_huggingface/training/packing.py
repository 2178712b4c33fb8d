"""Whether a model computes packed rows as it computes them one by one."""

from __future__ import annotations

import torch
from transformers import (
    PreTrainedModel,
)

from arctic_plugins.errors import ConfigError


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise ConfigError if what stands in one packed row changes the logits of the row behind it: some models'
    attention takes no notice.
    """
    lengths, vocabulary = (5, 7), min(model.config.get_text_config().vocab_size, 1000)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(model.device)
    first = torch.arange(sum(lengths), device=model.device)[None] % vocabulary
    second = first.clone()
    second[:, : lengths[0]] = (second[:, : lengths[0]] + vocabulary // 2) % vocabulary
    training = model.training
    model.eval()
    one, other = (
        model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, lengths[0] :] for ids in (first, second)
    )
    model.train(training)
    # In a mixture other tokens share the experts, and products of other sizes round otherwise; rows that see each other
    # differ by much more.
    tolerance = 0.05 * one.abs().max() if any(hasattr(module, "num_experts") for module in model.modules()) else 1e-6
    if (one - other).abs().max() > tolerance:
        kind = f"{model.config.model_type}, attention '{model.config._attn_implementation}'"
        raise ConfigError(
            f"data.packing is on, and in this model ({kind}) packed rows see each other",
            fix="try another load.attn_implementation, or turn data.packing off",
        )
