"""The laws of dispatches of experts, however they move rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

import pytest

from arctic_plugins.testing.suite import Suite

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_plugins.frozen import ExpertsDispatch

__all__ = ["DispatchSuite"]


class DispatchSuite(Suite):
    """The laws of :class:`arctic_plugins.frozen.ExpertsDispatch`, on CPU::

        class TestMyDispatch(DispatchSuite):
            dispatches = [MyDispatch(size=1)]

    In each process of a distributed run (:func:`~arctic_plugins.testing.run_processes`), ``DispatchSuite().check(
    dispatch=...)`` runs the laws for a dispatch that spreads experts; all processes call it together.
    """

    over = {"dispatch": "dispatches"}

    dispatches: ClassVar[Sequence[ExpertsDispatch]]
    """Dispatches of size 1, as a plugin's ``claim`` hook would return them."""
    num_experts: ClassVar[int] = 8
    """Number of experts in the mixtures to try; a multiple of the number of processes."""

    def test_one_object_serves_every_copy(self, dispatch: ExpertsDispatch) -> None:
        assert copy.deepcopy(dispatch) is dispatch, "a dispatch is one object for every copy of a model"

    def test_rank_is_one_of_the_processes(self, dispatch: ExpertsDispatch) -> None:
        assert 0 <= dispatch.rank < dispatch.size, f"rank is {dispatch.rank} of {dispatch.size}"

    def test_every_expert_is_in_one_process(self, dispatch: ExpertsDispatch) -> None:
        import torch

        held = torch.zeros(self.num_experts)
        held[dispatch.local(self.num_experts)] = 1
        assert torch.equal(_of_all(dispatch, held), torch.ones(self.num_experts)), (
            "local() omits an expert or assigns one twice"
        )

    def test_pieces_add_up_and_are_the_same_in_all_processes(self, dispatch: ExpertsDispatch) -> None:
        import torch

        pieces, here = dispatch.pieces(self.num_experts), dispatch.local(self.num_experts)
        assert all(piece > 0 for piece in pieces), f"pieces() contains an empty piece: {pieces}"
        assert sum(pieces) == here.stop - here.start, "pieces() do not add up to the experts of this process"
        cuts = torch.zeros(self.num_experts)
        cuts[list(accumulate(pieces, initial=-1))[1:]] = 1
        assert torch.equal(_of_all(dispatch, cuts), cuts * dispatch.size), "pieces() differ between processes"

    def test_rows_and_gradients_reach_their_experts(self, dispatch: ExpertsDispatch) -> None:
        import torch

        generator = torch.Generator().manual_seed(1 + dispatch.rank)
        for tokens in (13, 0 if dispatch.rank == 0 else 3, 1):
            index = torch.randint(0, self.num_experts, (tokens, 2), generator=generator)
            _check_rows(dispatch, torch.randn(tokens, 6, generator=generator), index, self.num_experts)

    def test_all_rows_may_go_to_one_expert(self, dispatch: ExpertsDispatch) -> None:
        import torch

        generator = torch.Generator().manual_seed(1 + dispatch.rank)
        _check_rows(dispatch, torch.randn(5, 6, generator=generator), torch.zeros(5, 2).long(), self.num_experts)

    def test_capacity_only_drops(self, dispatch: ExpertsDispatch) -> None:
        import torch

        generator = torch.Generator().manual_seed(1 + dispatch.rank)
        index = torch.randint(0, self.num_experts, (40, 2), generator=generator)
        weights = torch.rand(40, 2, generator=generator)
        kept, kept_weights = dispatch.apply_capacity(index.clone(), weights.clone(), self.num_experts)
        assert kept.shape == index.shape, "apply_capacity() changes the shape of the index"
        assert kept_weights.shape == weights.shape, "apply_capacity() changes the shape of the weights"
        assert ((kept == index) | (kept == self.num_experts)).all(), (
            "apply_capacity() sends a token to an expert that was not chosen"
        )

    def test_sums_are_over_copies(self, dispatch: ExpertsDispatch) -> None:
        import torch
        import torch.distributed as dist

        if dispatch.size == 1:
            pytest.skip("the experts are not spread over processes")
        copies = dist.get_world_size() // dispatch.size
        total = torch.full((3,), dispatch.rank + 1.0)
        dispatch.sum_over_copies(total)
        assert torch.equal(total, torch.full((3,), (dispatch.rank + 1.0) * copies)), (
            "sum_over_copies() returns another sum"
        )

    def test_parts_are_gathered_in_the_first_process(self, dispatch: ExpertsDispatch) -> None:
        import torch
        import torch.distributed as dist

        if dispatch.size == 1:
            pytest.skip("the experts are not spread over processes")
        gathered = dispatch.gather(torch.full((2, 3), float(dispatch.rank), dtype=torch.bfloat16))
        if dist.get_rank() == 0:
            assert gathered is not None, "gather() returns nothing in the first process"
            expected = [torch.full((2, 3), float(each), dtype=torch.bfloat16) for each in range(dispatch.size)]
            assert len(gathered) == dispatch.size, f"gather() returns {len(gathered)} of {dispatch.size} parts"
            assert all(map(torch.equal, gathered, expected)), "gather() returns wrong parts, or a wrong order"
        else:
            assert gathered is None, "gather() returns parts in a process other than the first"


def _of_all(dispatch: ExpertsDispatch, tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` over the processes that share one copy of the experts."""
    total = tensor.clone()
    if dispatch.size > 1:
        dispatch.sum_over_parts(total)
    return total


def _check_rows(
    dispatch: ExpertsDispatch,
    x_MK: Tensor,
    index_MT: Tensor,
    num_experts: int,
) -> None:
    """Check rows with experts that each multiply by their own factor.

    Each row must be multiplied by its expert's factor and return to its place, and so must gradients.
    """
    import torch

    from arctic_plugins.frozen import Mixture

    def products(first: int, rows: Tensor, counts: Tensor) -> Tensor:
        assert int(counts.sum()) == len(rows), "receive() returns counts that do not match its rows"
        own = factors[first : first + len(counts)]
        return rows * own.repeat_interleave(counts).unsqueeze(-1)

    x_MK = x_MK.requires_grad_()
    weights_MT = torch.linspace(0.5, 1.5, index_MT.numel()).view(index_MT.shape)
    factors = torch.arange(1.0, num_experts + 1).requires_grad_()
    here, sizes = dispatch.local(num_experts), dispatch.pieces(num_experts)
    firsts = accumulate(sizes[:-1], initial=here.start)
    pieces = [(size, partial(products, first)) for first, size in zip(firsts, sizes, strict=True)]
    y_MK = Mixture(x_MK, index_MT, weights_MT, num_experts, pieces, dispatch).finish()
    scale_MK = torch.linspace(-1, 1, y_MK.numel()).view(y_MK.shape)
    (y_MK * scale_MK).sum().backward()
    found, of_rows = (torch.zeros_like(each) if each.grad is None else each.grad for each in (factors, x_MK))

    by_token = (weights_MT * (index_MT + 1)).sum(1, keepdim=True)
    expected = torch.zeros(num_experts)
    of_tokens = (x_MK.detach() * scale_MK).sum(1, keepdim=True) * weights_MT
    expected.index_put_((index_MT.reshape(-1),), of_tokens.reshape(-1), accumulate=True)
    close = partial(torch.allclose, rtol=1e-4, atol=1e-4)
    assert close(y_MK, x_MK * by_token), "a row reached the wrong expert or the wrong place"
    assert close(of_rows, scale_MK * by_token), "gradients of rows took another way"
    elsewhere = torch.ones(num_experts, dtype=torch.bool)
    elsewhere[here] = False
    assert not found[elsewhere].any(), "an expert of another process was computed here"
    assert close(_of_all(dispatch, found), _of_all(dispatch, expected)), (
        "gradients of experts are not those of all rows"
    )
