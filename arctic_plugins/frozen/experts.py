"""The experts of a mixture over encoded bytes, for any codec and placement, in this process or in others.

Only experts with tokens are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from arctic_plugins.frozen.dispatch import DispatchedTokens, ExpertsDispatch, LocalTokens
from arctic_plugins.frozen.module import FrozenModule

__all__ = ["FrozenExperts", "Mixture", "grouped_linear", "in_blocks", "mix_experts", "piece_sizes", "start_experts"]

Product = Callable[[Tensor, Tensor], Tensor]
"""``(rows sorted by expert, number of rows of each expert) -> rows``. The numbers are int64 ``[E]`` on the same device.

Rows after those of the last expert belong to none; what they become is finite, and is multiplied by zero.
"""
Piece = tuple[int, Product]
"""Experts that are computed together: their number, and their product."""
Update = Callable[[Tensor, Tensor, Tensor], Tensor]
"""How an adapter changes a product: ``(product, rows, number of rows of each expert) -> product``. The key in
:attr:`FrozenExperts.updates` is the leaf.
"""


class Mixture:
    """A mixture of experts, computed in three steps.

    With the matrices of expert ``index[m, t]``, the result is
    ``y[m] = sum over t of weights[m, t] * down(act(up(x[m])))``.

    Creating the object starts sending rows to their experts. :meth:`compute` multiplies, and starts returning the
    results. :meth:`result` waits for them and sums. Whatever is computed between the steps, in the forward pass and
    (through autograd) in the backward pass, overlaps with the communication of a dispatch. Pieces of the experts also
    overlap with each other's communication. Compilers skip all steps, because the number of tokens of each expert
    depends on data.

    Args:
        x_MK: tokens.
        index_MT: for each token, the indices of its T experts; an index outside ``0 <= index < num_experts`` (an expert
            of another process, or a token that was dropped) adds nothing.
        weights_MT: the routing weights.
        num_experts: E, in all processes together.
        pieces: for each piece, how many of this process's experts are computed together, and a function ``(rows sorted
            by expert, number of rows of each of them) -> rows``: ``down(act(up(rows)))``. One piece unless the dispatch
            wants more.
        dispatch: None if all experts are in this process.
    """

    def __init__(
        self,
        x_MK: Tensor,
        index_MT: Tensor,
        weights_MT: Tensor,
        num_experts: int,
        pieces: Sequence[Piece],
        dispatch: ExpertsDispatch | None = None,
    ) -> None:
        self.tokens, self.top = index_MT.shape
        self.dtype, self.pieces = x_MK.dtype, pieces
        index = index_MT.reshape(-1)
        index = index.where((index >= 0) & (index < num_experts), num_experts)
        sizes, processes = [size for size, _ in pieces], 1 if dispatch is None else dispatch.size
        if len(sizes) > 1:
            index = _places(sizes, processes).to(index.device)[index]
        self.order = index.argsort(stable=True)
        ends = torch.searchsorted(index[self.order], torch.arange(num_experts, device=index.device), right=True)
        counts, weights = ends.diff(prepend=ends.new_zeros(1)), weights_MT.reshape(-1)
        if index.is_cuda and dispatch is None:  # what the device has counted is not waited for
            kept = torch.arange(len(index), device=index.device) < ends[-1]
            self.weights = weights[self.order].where(kept, 0)
        else:
            self.order = self.order[: int(ends[-1])]
            self.weights = weights[self.order]
        rows = x_MK[self.order // self.top]
        self.dispatched: Sequence[DispatchedTokens] = (
            [LocalTokens(rows, counts)]
            if dispatch is None
            else dispatch.dispatch(rows, counts.split([size * processes for size in sizes]))
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute(self) -> None:
        """Multiply the rows of this process's experts."""
        for tokens, (_, products) in zip(self.dispatched, self.pieces, strict=True):
            tokens.combine(products(*tokens.receive()))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def result(self) -> Tensor:
        """Return ``[M, K]`` in the dtype of ``x_MK``. Sums are computed in the dtype of rows times routing weights."""
        returned = [tokens.combined() for tokens in self.dispatched]
        rows = returned[0] if len(returned) == 1 else torch.cat(returned)
        rows = rows * self.weights.unsqueeze(-1)
        by_token = rows.new_zeros(self.tokens * self.top, rows.shape[-1]).index_put((self.order,), rows)
        return by_token.view(self.tokens, self.top, rows.shape[-1]).sum(1).to(self.dtype)

    def finish(self) -> Tensor:
        """Run both steps, for callers with nothing to compute in between."""
        self.compute()
        return self.result()


def _places(sizes: Sequence[int], processes: int) -> Tensor:
    """Return expert -> its place when experts are sorted by piece, then by process; the last place is for no expert."""
    experts = torch.arange(sum(sizes) * processes).view(processes, -1)
    sequence = torch.cat([piece.reshape(-1) for piece in experts.split(list(sizes), 1)])
    return torch.cat([sequence.argsort(), torch.tensor([len(sequence)])])


def mix_experts(x_MK: Tensor, index_MT: Tensor, weights_MT: Tensor, num_experts: int, products: Product) -> Tensor:
    """Run all steps of a :class:`Mixture` in one piece, with all experts in this process."""
    return Mixture(x_MK, index_MT, weights_MT, num_experts, [(num_experts, products)]).finish()


def grouped_linear(rows_RK: Tensor, weight_ENK: Tensor, counts: Tensor) -> Tensor:
    """Return ``rows @ weight[e].T`` for the rows of each expert.

    Uses torch's grouped product, which requires that K and N elements each take a multiple of 16 bytes, and otherwise
    one product per expert, which waits for a GPU.

    Args:
        rows_RK: sorted by expert.
        weight_ENK: one matrix per expert, cast to the dtype of the rows.
        counts: number of rows of each expert, int64 ``[E]`` on the device of the rows. Experts without rows are not
            read, forward or backward; their gradient is zero. Rows after those of the last expert get any finite
            result; a gradient of zero for them stays zero.
    """
    if any(size * rows_RK.element_size() % 16 for size in weight_ENK.shape[1:]):
        sizes = counts.tolist()
        own = [
            rows @ weight_ENK[expert].to(rows.dtype).mT
            for expert, rows in enumerate(rows_RK.split([*sizes, len(rows_RK) - sum(sizes)])[:-1])
            if len(rows)
        ]
        result = torch.cat(own) if own else rows_RK[:0] @ weight_ENK[0].to(rows_RK.dtype).mT
        return (
            result if len(result) == len(rows_RK) else nn.functional.pad(result, (0, 0, 0, len(rows_RK) - len(result)))
        )
    ends = counts.cumsum(0, dtype=torch.int32)
    ends[-1] = len(rows_RK)  # grouped_mm leaves what follows the last end undefined
    return nn.functional.grouped_mm(rows_RK, weight_ENK.to(rows_RK.dtype).mT, offs=ends)


BLOCK = 24 << 20
"""Bytes. glibc's malloc requests anything of 32 MiB and more from the system anew (mallopt(3), M_MMAP_THRESHOLD). The
first use of each of its pages costs as much as the arithmetic of activations."""


def in_blocks(products: Product, rows_RK: Tensor, counts: Tensor, width: int) -> Tensor:
    """Return ``products(rows, counts)``, computed on CPU for a few experts at a time.

    An intermediate result of ``width`` columns then has at most :data:`BLOCK` bytes, or the rows of one expert."""
    limit = BLOCK // (width * rows_RK.element_size())
    if rows_RK.device.type != "cpu" or len(rows_RK) <= limit:
        return products(rows_RK, counts)
    blocks: list[list[int]] = []
    free = 0
    for expert, count in enumerate(counts.tolist()):
        if count and count > free:
            blocks.append([0] * len(counts))
            free = limit
        if count:
            blocks[-1][expert] = count
            free -= count
    return torch.cat(
        [
            products(rows, torch.tensor(block))
            for rows, block in zip(rows_RK.split([sum(block) for block in blocks]), blocks, strict=True)
        ]
    )


def piece_sizes(experts: Any) -> list[int]:
    """Return how many experts of a module are computed together, piece after piece.

    The module has ``num_experts`` and perhaps a ``dispatch``.
    """
    dispatch: ExpertsDispatch | None = getattr(experts, "dispatch", None)
    return [experts.num_experts] if dispatch is None else dispatch.pieces(experts.num_experts)


def start_experts(experts: Any, x_MK: Tensor, index_MT: Tensor, weights_MT: Tensor, pieces: Sequence[Piece]) -> Mixture:
    """Start the :class:`Mixture` of a module ``experts`` with ``num_experts`` and perhaps a ``dispatch``.

    It computes in the autocast dtype under autocast. While training, it uses the routing that the dispatch returns
    (:meth:`ExpertsDispatch.apply_capacity`)."""
    dispatch: ExpertsDispatch | None = getattr(experts, "dispatch", None)
    if torch.is_autocast_enabled(x_MK.device.type):
        x_MK = x_MK.to(torch.get_autocast_dtype(x_MK.device.type))
    if dispatch is not None and experts.training:
        index_MT, weights_MT = dispatch.apply_capacity(index_MT, weights_MT, experts.num_experts)
    return Mixture(x_MK, index_MT, weights_MT, experts.num_experts, pieces, dispatch)


class FrozenExperts(FrozenModule):
    """Two encoded weights with one matrix per expert, called as transformers calls experts.

    Read in transformers 5.19.0, ``integrations/moe.py``.

    Args:
        num_experts: E, in all processes together.
        act: activation and gate between the two: from ``[rows, 2I]`` for a gated MLP, otherwise ``[rows, I]``, to
            ``[rows, I]``.
        up, down: names of the two weights, which the caller adds with :meth:`add_weight`: ``[E, 2I, K]`` or ``[E, I,
            K]``, and ``[E, K, I]``, where E counts only the experts of this process.
        dtype: compute dtype.
        dispatch: how rows reach experts in other processes; None if all are here.
    """

    def __init__(
        self,
        num_experts: int,
        act: Callable[[Tensor], Tensor],
        *,
        up: str = "gate_up_proj",
        down: str = "down_proj",
        dtype: torch.dtype | None = None,
        dispatch: ExpertsDispatch | None = None,
    ) -> None:
        super().__init__(dtype)
        self.num_experts, self.act, self.up, self.down, self.dispatch = num_experts, act, up, down, dispatch
        self.updates: dict[str, Update] = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # how many tokens an expert gets depends on data
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map ``hidden_states [M, K]``, ``top_k_index [M, T]`` and ``top_k_weights [M, T]`` to ``[M, K]``.

        See :class:`Mixture`.
        """
        return self.start(hidden_states, top_k_index, top_k_weights).finish()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def start(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Mixture:
        """Start the same computation in steps."""
        sizes = piece_sizes(self)
        if any(weight.handle is not None for weight in self.frozen.values()):  # fetched once for all rows
            return start_experts(self, hidden_states, top_k_index, top_k_weights, [(sum(sizes), self._products)])
        firsts = [0, *accumulate(sizes)]
        pieces = [(size, partial(self._piece, first)) for size, first in zip(sizes, firsts, strict=False)]
        return start_experts(self, hidden_states, top_k_index, top_k_weights, pieces)

    def _piece(self, first: int, rows: Tensor, counts: Tensor) -> Tensor:
        of_all = counts.new_zeros(self.frozen[self.up].shape[0])
        of_all[first : first + len(counts)] = counts
        return in_blocks(self._products, rows, of_all, self.frozen[self.up].shape[1])

    def _products(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Return ``down(act(up(rows)))``, each row with its expert's matrices."""
        return self._adapted(self.act(self._adapted(rows, self.up, counts)), self.down, counts)

    def _adapted(self, rows: Tensor, leaf: str, counts: Tensor) -> Tensor:
        product = self.multiply(rows, leaf, counts)
        return self.updates[leaf](product, rows, counts) if leaf in self.updates else product

    def extra_repr(self) -> str:
        weights = ", ".join(
            f"{leaf}={weight.shape} {weight.codec}{', placed' if weight.handle else ''}"
            for leaf, weight in self.frozen.items()
        )
        return f"num_experts={self.num_experts}, {weights}"
