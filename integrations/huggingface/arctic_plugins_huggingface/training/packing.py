"""Check whether a model computes packed rows in the same way as single rows."""

from __future__ import annotations

import torch
from transformers import (
    PreTrainedModel,
)

from arctic_plugins.errors import ConfigError


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raise ConfigError if the content of a packed row changes the logits of the row after it.

    The attention of some models ignores the borders between packed rows.
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
    # In a mixture, different tokens share the experts, and products of different sizes round differently. Rows that
    # attend to each other differ by much more.
    tolerance = 0.05 * one.abs().max() if any(hasattr(module, "num_experts") for module in model.modules()) else 1e-6
    if (one - other).abs().max() > tolerance:
        kind = f"{model.config.model_type}, attention '{model.config._attn_implementation}'"
        raise ConfigError(
            f"data.packing is on, but in this model ({kind}) packed rows attend to each other",
            fix="try another load.attn_implementation, or turn data.packing off",
        )
