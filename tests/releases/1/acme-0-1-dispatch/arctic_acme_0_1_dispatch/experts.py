"""The experts function of transformers that computes plain experts through their dispatch.

Read in transformers 5.19.0 (``integrations/moe.py``). Encoded experts (``arctic_plugins.frozen.FrozenExperts``) do not
need it.
"""

from __future__ import annotations

from typing import Any

import torch
from arctic_plugins.frozen import grouped_linear, start_experts
from torch import Tensor

__all__ = ["mix"]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of rows of an expert depends on the data
def mix(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the mixture of ``experts``, a module of transformers.

    Args:
        experts: the module, with the weights of this process's experts.
        hidden_states: ``[M, K]``.
        top_k_index: ``[M, T]``.
        top_k_weights: ``[M, T]``.

    Returns:
        ``[M, K]``.
    """
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj

    def products(rows: Tensor, counts: Tensor) -> Tensor:
        inner = grouped_linear(rows, up, counts)
        return grouped_linear(
            experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner), experts.down_proj, counts
        )

    return start_experts(experts, hidden_states, top_k_index, top_k_weights, [(len(up), products)]).finish()
