"""RoPE types that installed plugins register, in vLLM.

Read in vllm 0.32.0 (``model_executor/layers/rotary_embedding``).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.discovery import process_registry
from arctic_plugins.patches import patch
from arctic_plugins.provenance import FILE_NAME
from arctic_plugins.registry import ROPE_MARK
from arctic_plugins_vllm.compat import ROPE_TYPES, RotaryEmbedding, loading, rotary_embedding, says

__all__ = ["get_rope", "install"]


def install() -> None:
    """Make vLLM's ``get_rope`` support the types of plugins, and all positions of this project's checkpoints.

    vLLM's models import the function from its package when they are imported themselves. Other models are not affected.
    Idempotent.
    """
    why = "RoPE types of plugins, and all positions of scaled checkpoints; vLLM has no registry of them"
    patch(rotary_embedding, "get_rope", why=why, read_in="vllm 0.32.0")(get_rope)


def get_rope(
    stock: Callable[..., Any],
    head_size: int,
    max_position: int,
    is_neox_style: bool = True,
    rope_parameters: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return the rotary embedding, with the arguments of vLLM's function of the same name, which is ``stock``."""
    parameters = dict(rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    if kind in process_registry().rope_types() and kind not in ROPE_TYPES:
        return _scaled(
            head_size,
            max_position,
            is_neox_style,
            json.dumps(parameters, sort_keys=True),
            dtype or torch.get_default_dtype(),
        )
    if (
        kind in ("dynamic", "ntk")
        and "factor" in parameters
        and "max_trained_positions" not in parameters
        and _is_ours()
    ):
        # vLLM accepts texts of factor * max_position_embeddings tokens, but computes only max_position_embeddings
        # positions.
        if kind == "dynamic":
            parameters["max_trained_positions"] = max_position
        max_position = int(max_position * parameters["factor"])
    return stock(head_size, max_position, is_neox_style, parameters or None, dtype, *args, **kwargs)


def _is_ours() -> bool:
    """Return whether the model that is being built is scaled by the ``rope`` plugin.

    Earlier versions wrote no mark, but they wrote provenance.
    """
    return says(ROPE_MARK) or (Path(loading()[0]) / FILE_NAME).is_file()


@functools.cache
def _scaled(head_size: int, max_position: int, is_neox_style: bool, parameters: str, dtype: torch.dtype) -> Any:
    """Return the rotary embedding, one for all layers with the same parameters."""
    read = json.loads(parameters)
    rotary_dim = int(head_size * read.get("partial_rotary_factor", 1.0))
    length = int(max_position * (read.get("factor") or 1.0))
    return _RegisteredRotaryEmbedding(head_size, rotary_dim, length, read["rope_theta"], is_neox_style, dtype, read)


class _RegisteredRotaryEmbedding(RotaryEmbedding):
    """A rotary embedding with the frequencies and attention scaling of a registered function."""

    def __init__(
        self,
        head_size: int,
        rotary_dim: int,
        length: int,
        base: float,
        is_neox_style: bool,
        dtype: torch.dtype,
        parameters: Mapping[str, Any],
    ) -> None:
        self.inv_freq, self.attention_scaling = process_registry().load_rope_type(parameters["rope_type"])(
            parameters, rotary_dim
        )
        super().__init__(head_size, rotary_dim, length, base, is_neox_style, dtype)

    def _compute_inv_freq(self, base: float) -> Tensor:
        return self.inv_freq

    def _compute_cos_sin_cache(self) -> Tensor:
        return super()._compute_cos_sin_cache() * self.attention_scaling
