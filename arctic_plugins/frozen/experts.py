"""The experts of a mixture over encoded bytes: any codec, any placement; only experts that received tokens are decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arctic_plugins.frozen.module import FrozenModule

__all__ = ["FrozenExperts", "mix_experts"]

Product = Callable[[Tensor, Sequence[int]], Tensor]
"""``(rows sorted by expert, rows of each expert) -> rows``."""


def mix_experts(
    x_MK: Tensor, index_MT: Tensor, weights_MT: Tensor, num_experts: int, up: Product, act: Callable[[Tensor], Tensor], down: Product
) -> Tensor:
    """``y[m] = sum over t of weights[m, t] * down(act(up(x[m])))`` with the matrices of expert ``index[m, t]``.

    Args:
        x_MK: tokens.
        index_MT: for each token the indices of its T experts; an index outside ``0 <= index < num_experts`` (an expert of another process) adds
            nothing.
        weights_MT: the routing weights.
        num_experts: E.
        up: first product, to ``[rows, 2I]`` of a gated MLP, to ``[rows, I]`` otherwise.
        act: activation and gate, to ``[rows, I]``.
        down: second product, to ``[rows, K]``.

    Returns:
        ``[M, K]`` in the dtype of ``x_MK``. Sums are in the dtype of products with the weights.
    """
    tokens, top = index_MT.shape
    index = index_MT.reshape(-1)
    index = index.where((index >= 0) & (index < num_experts), num_experts)
    counts = torch.bincount(index, minlength=num_experts + 1).tolist()[:num_experts]
    order = index.argsort(stable=True)[: sum(counts)]
    rows = down(act(up(x_MK[order // top], counts)), counts)
    rows = rows * weights_MT.reshape(-1)[order].unsqueeze(-1)
    by_token = rows.new_zeros(tokens * top, rows.shape[-1]).index_put((order,), rows)
    return by_token.view(tokens, top, rows.shape[-1]).sum(1).to(x_MK.dtype)


class FrozenExperts(FrozenModule):
    """Two encoded weights with one matrix per expert, called as transformers calls experts (``integrations/moe.py``, 5.19.0).

    Args:
        num_experts: E.
        act: activation and gate between the two: ``[rows, 2I]`` of a gated MLP, ``[rows, I]`` otherwise, to ``[rows, I]``.
        up, down: names of the two weights, which the caller adds with :meth:`add_weight`: ``[E, 2I, K]`` or ``[E, I, K]``, and ``[E, K, I]``.
        dtype: compute dtype.
    """

    def __init__(
        self,
        num_experts: int,
        act: Callable[[Tensor], Tensor],
        *,
        up: str = "gate_up_proj",
        down: str = "down_proj",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dtype)
        self.num_experts, self.act, self.up, self.down = num_experts, act, up, down

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # which expert gets how many tokens depends on data
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states [M, K]``, ``top_k_index [M, T]``, ``top_k_weights [M, T]`` -> ``[M, K]``; see :func:`mix_experts`."""
        x_MK = hidden_states
        if torch.is_autocast_enabled(x_MK.device.type):
            x_MK = x_MK.to(torch.get_autocast_dtype(x_MK.device.type))

        def up(rows: Tensor, counts: Sequence[int]) -> Tensor:
            return self.multiply(rows, self.up, counts)

        def down(rows: Tensor, counts: Sequence[int]) -> Tensor:
            return self.multiply(rows, self.down, counts)

        return mix_experts(x_MK, top_k_index, top_k_weights, self.num_experts, up, self.act, down)

    def extra_repr(self) -> str:
        weights = ", ".join(f"{leaf}={weight.shape} {weight.codec}{', placed' if weight.handle else ''}" for leaf, weight in self.frozen.items())
        return f"num_experts={self.num_experts}, {weights}"
