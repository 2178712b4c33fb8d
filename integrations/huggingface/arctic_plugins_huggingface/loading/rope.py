"""RoPE types of installed plugins in transformers, and the number of positions of a model.

Read in transformers 5.19.0 (``modeling_rope_utils.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RotaryEmbeddingConfigMixin

from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import PluginError

__all__ = ["positions", "register_rope_types"]


def register_rope_types() -> None:
    """Register the RoPE types of installed plugins with transformers.

    Names that transformers already has keep their meaning. Idempotent.

    Raises:
        PluginError: a name contains "dynamic". For such types, transformers recomputes the frequencies whenever a text
            is longer than those before.
    """
    registry = process_registry()
    for name in registry.rope_types():
        if name in ROPE_INIT_FUNCTIONS:
            continue
        if "dynamic" in name:
            raise PluginError(
                f"RoPE type '{name}' is registered",
                expected="a name without 'dynamic', which marks types that depend on a text's length in transformers",
            )
        ROPE_INIT_FUNCTIONS[name] = partial(_frequencies, name)
        setattr(RotaryEmbeddingConfigMixin, f"_validate_{name}_rope_parameters", _validate)


def positions(config: PreTrainedConfig) -> int | None:
    """Return the maximum number of tokens that the model of ``config`` takes, including RoPE scaling.

    None if the config sets no limit. Configs differ in whether ``max_position_embeddings`` is the limit before or after
    scaling (``modeling_rope_utils.py``, transformers 5.19.0); the larger number is returned.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    scaling = getattr(text, "rope_parameters", None) or {}
    scaled = [limit]
    for parameters in (scaling, *(nested for nested in scaling.values() if isinstance(nested, Mapping))):
        original, factor = parameters.get("original_max_position_embeddings") or limit, parameters.get("factor") or 1
        scaled.append(int(original * factor))
    return max(scaled)


def _frequencies(
    name: str,
    config: Any,
    device: torch.device | None = None,
    seq_len: int | None = None,  # noqa: ARG001 - transformers passes it
    layer_type: str | None = None,
) -> tuple[Tensor, float]:
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # While a model is loading, the default device is meta, but not for every function of torch that makes a tensor.
    with torch.device("cpu"):
        inv_freq, scaling = process_registry().load_rope_type(name)(
            parameters, int(head * parameters.get("partial_rotary_factor", 1.0))
        )
    return inv_freq.to(torch.get_default_device() if device is None else device), scaling


def _validate(self: Any, rope_parameters: dict[str, Any], ignore_keys: set[str] | None = None) -> None:
    """Accept all parameters that the function accepts; otherwise transformers would warn that it has no rules."""
