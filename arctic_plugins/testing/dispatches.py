"""Checks that every dispatch of experts must pass, however it moves rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_plugins.frozen import ExpertsDispatch

__all__ = ["check_dispatch"]


def check_dispatch(dispatch: ExpertsDispatch, *, num_experts: int = 8) -> None:
    """Check that ``dispatch`` obeys the protocol of :class:`arctic_plugins.frozen.ExpertsDispatch`.

    Call it in one process with a dispatch of size 1, and in each process of a distributed run
    (:func:`~arctic_plugins.testing.run_processes`) with one that spreads experts; there, it is collective.

    Args:
        dispatch: a dispatch as a plugin's ``claim`` hook would return it, on CPU.
        num_experts: number of experts in the mixtures to try; a multiple of ``dispatch.size``.

    Raises:
        AssertionError: if a law is broken; the message names the law.
    """
    import copy

    import torch
    import torch.distributed as dist

    assert copy.deepcopy(dispatch) is dispatch, "a dispatch is one object for every copy of a model"
    size, rank, here = dispatch.size, dispatch.rank, dispatch.local(num_experts)
    assert 0 <= rank < size, f"rank is {rank} of {size}"
    pieces = dispatch.pieces(num_experts)
    assert all(piece > 0 for piece in pieces), f"pieces() contains an empty piece: {pieces}"
    assert sum(pieces) == here.stop - here.start, "pieces() do not add up to the experts of this process"

    def of_all(tensor: Tensor) -> Tensor:
        """Return the sum of ``tensor`` over the processes that share one copy of the experts."""
        total = tensor.clone()
        if size > 1:
            dispatch.sum_over_parts(total)
        return total

    held = torch.zeros(num_experts)
    held[here] = 1
    assert torch.equal(of_all(held), torch.ones(num_experts)), "local() omits an expert or assigns one twice"
    cuts = torch.zeros(num_experts)
    cuts[list(accumulate(pieces, initial=-1))[1:]] = 1
    assert torch.equal(of_all(cuts), cuts * size), "pieces() differ between processes"

    generator = torch.Generator().manual_seed(1 + rank)
    for tokens in (13, 0 if rank == 0 else 3, 1):
        index = torch.randint(0, num_experts, (tokens, 2), generator=generator)
        _check_rows(dispatch, of_all, torch.randn(tokens, 6, generator=generator), index, num_experts)
    _check_rows(dispatch, of_all, torch.randn(5, 6, generator=generator), torch.zeros(5, 2).long(), num_experts)

    index = torch.randint(0, num_experts, (40, 2), generator=generator)
    weights = torch.rand(40, 2, generator=generator)
    kept, kept_weights = dispatch.apply_capacity(index.clone(), weights.clone(), num_experts)
    assert kept.shape == index.shape, "apply_capacity() changes the shape of the index"
    assert kept_weights.shape == weights.shape, "apply_capacity() changes the shape of the weights"
    assert ((kept == index) | (kept == num_experts)).all(), (
        "apply_capacity() sends a token to an expert that was not chosen"
    )

    if size > 1:
        copies = dist.get_world_size() // size
        total = torch.full((3,), rank + 1.0)
        dispatch.sum_over_copies(total)
        assert torch.equal(total, torch.full((3,), (rank + 1.0) * copies)), "sum_over_copies() returns another sum"
        gathered = dispatch.gather(torch.full((2, 3), float(rank), dtype=torch.bfloat16))
        if dist.get_rank() == 0:
            assert gathered is not None, "gather() returns nothing in the first process"
            expected = [torch.full((2, 3), float(each), dtype=torch.bfloat16) for each in range(size)]
            assert len(gathered) == size, f"gather() returns {len(gathered)} of {size} parts"
            assert all(map(torch.equal, gathered, expected)), "gather() returns wrong parts, or a wrong order"
        else:
            assert gathered is None, "gather() returns parts in a process other than the first"


def _check_rows(
    dispatch: ExpertsDispatch,
    of_all: Callable[[Tensor], Tensor],
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
    assert close(of_all(found), of_all(expected)), "gradients of experts are not those of all rows"
