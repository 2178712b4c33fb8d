"""The experts implementation ``arctic``: plain, trainable experts of transformers, with or without a dispatch.

Read in transformers 5.19.0 (``integrations/moe.py``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.frozen import Mixture, grouped_linear, in_blocks, piece_sizes, start_experts

__all__ = ["IMPLEMENTATION", "mix_plain", "start_plain"]

IMPLEMENTATION = "arctic"
"""The name for ``from_pretrained(experts_implementation=...)``."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of tokens per expert depends on the data
def mix_plain(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the mixture of ``experts``, a transformers module.

    Args:
        experts: the module.
        hidden_states: ``[M, K]``.
        top_k_index: ``[M, T]``.
        top_k_weights: ``[M, T]``.

    Returns:
        ``[M, K]``.
    """
    return start_plain(experts, hidden_states, top_k_index, top_k_weights).finish()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def start_plain(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Mixture:
    """Compute the same as :func:`mix_plain` in steps; see :class:`arctic_plugins.frozen.Mixture`."""
    sizes, up, down = (
        piece_sizes(experts),
        experts.gate_up_proj if experts.has_gate else experts.up_proj,
        experts.down_proj,
    )
    # Split once, so that autograd concatenates the gradients of the pieces instead of summing gradients of all experts.
    weights = zip(up.split(sizes), down.split(sizes), strict=True) if len(sizes) > 1 else [(up, down)]
    pieces = [(size, partial(_products, experts, *own)) for size, own in zip(sizes, weights, strict=True)]
    return start_experts(experts, hidden_states, top_k_index, top_k_weights, pieces)


def _products(experts: Any, up: Tensor, down: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    def products(rows: Tensor, counts: Tensor) -> Tensor:
        inner = grouped_linear(rows, up, counts)
        return grouped_linear(experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner), down, counts)

    if up.requires_grad:  # with blocks, each one would have a gradient for all experts
        return products(rows, counts)
    return in_blocks(products, rows, counts, up.shape[1])
