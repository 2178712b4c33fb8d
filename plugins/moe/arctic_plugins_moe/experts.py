"""Plain, trainable experts as transformers holds them, through a dispatch or without one: the experts implementation ``arctic``.

Read in transformers 5.19.0 (``integrations/moe.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.frozen import Mixture, start_experts

__all__ = ["IMPLEMENTATION", "grouped_linear", "mix_plain", "start_plain"]

IMPLEMENTATION = "arctic"
"""The name for ``from_pretrained(experts_implementation=...)``."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # which expert gets how many tokens depends on data
def mix_plain(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``hidden_states [M, K]``, ``top_k_index [M, T]``, ``top_k_weights [M, T]`` -> ``[M, K]``; ``experts`` is the module of transformers."""
    return start_plain(experts, hidden_states, top_k_index, top_k_weights).finish()


def start_plain(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Mixture:
    """The same in steps; see :class:`arctic_plugins.frozen.Mixture`."""
    return start_experts(experts, hidden_states, top_k_index, top_k_weights, partial(_products, experts))


def _products(experts: Any, rows: Tensor, counts: Sequence[int]) -> Tensor:
    inner = grouped_linear(rows, experts.gate_up_proj if experts.has_gate else experts.up_proj, counts)
    return grouped_linear(experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner), experts.down_proj, counts)


def grouped_linear(rows_RK: Tensor, weight_ENK: Tensor, counts: Sequence[int]) -> Tensor:
    """``rows @ weight[e].T`` for the rows of each expert.

    Args:
        rows_RK: sorted by expert.
        weight_ENK: one matrix per expert; computed with in the dtype of the rows.
        counts: rows of each expert. Experts without rows are not read, forward or backward; their gradient is zero.
    """
    y_RN: Tensor = _GroupedLinear.apply(rows_RK, weight_ENK, tuple(counts))
    return y_RN


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        result = rows.new_empty(len(rows), weight.shape[1])
        for expert, part in _parts(counts):
            torch.mm(rows[part], weight[expert].to(rows.dtype).t(), out=result[part])
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        wants_rows, wants_weight, _ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows) if wants_rows else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        if grad_weight is not None:
            for expert, count in enumerate(ctx.counts):
                if not count:
                    grad_weight[expert].zero_()
        for expert, part in _parts(ctx.counts):
            if grad_rows is not None:
                torch.mm(grad[part], weight[expert].to(grad.dtype), out=grad_rows[part])
            if grad_weight is not None:
                if weight.dtype == grad.dtype:
                    torch.mm(grad[part].t(), rows[part], out=grad_weight[expert])
                else:
                    grad_weight[expert] = grad[part].t() @ rows[part]
        return grad_rows, grad_weight, None


def _parts(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has some."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, slice(start, start + count)))
            start += count
    return parts
