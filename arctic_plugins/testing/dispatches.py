"""What every dispatch of experts must do, however it moves rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_plugins.frozen import ExpertsDispatch

__all__ = ["check_dispatch"]


def check_dispatch(dispatch: ExpertsDispatch, *, num_experts: int = 8) -> None:
    """Assert the protocol of :class:`arctic_plugins.frozen.ExpertsDispatch`.

    Call it in one process with a dispatch of size 1, and in each process of a distributed run
    (:func:`~arctic_plugins.testing.run_processes`) with one that spreads experts: it is collective there.

    Args:
        dispatch: as a plugin's ``claim`` hook would give it, on CPU.
        num_experts: of the mixtures to try; a multiple of ``dispatch.size``.

    Raises:
        AssertionError: which law is broken.
    """
    import copy

    import torch
    import torch.distributed as dist

    assert copy.deepcopy(dispatch) is dispatch, "a dispatch is one object for every copy of a model"
    size, rank, here = dispatch.size, dispatch.rank, dispatch.local(num_experts)
    assert 0 <= rank < size, f"rank is {rank} of {size}"
    pieces = dispatch.pieces(num_experts)
    assert all(piece > 0 for piece in pieces), f"pieces() has an empty one: {pieces}"
    assert sum(pieces) == here.stop - here.start, "pieces() are not the experts of this process"

    def of_all(tensor: Tensor) -> Tensor:
        """What the processes with one copy of the experts have, added up."""
        total = tensor.clone()
        if size > 1:
            dispatch.sum_over_parts(total)
        return total

    held = torch.zeros(num_experts)
    held[here] = 1
    assert torch.equal(of_all(held), torch.ones(num_experts)), "local() leaves an expert out, or gives one to several"
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
    kept, kept_weights = dispatch.keep(index.clone(), weights.clone(), num_experts)
    assert kept.shape == index.shape, "keep() changes the shape of the index"
    assert kept_weights.shape == weights.shape, "keep() changes the shape of the weights"
    assert ((kept == index) | (kept == num_experts)).all(), "keep() sends a token to an expert that was not chosen"

    if size > 1:
        copies = dist.get_world_size() // size
        total = torch.full((3,), rank + 1.0)
        dispatch.sum_over_copies(total)
        assert torch.equal(total, torch.full((3,), (rank + 1.0) * copies)), "sum_over_copies() adds up something else"
        gathered = dispatch.gather(torch.full((2, 3), float(rank), dtype=torch.bfloat16))
        if dist.get_rank() == 0:
            assert gathered is not None, "gather() gives the first process nothing"
            expected = [torch.full((2, 3), float(each), dtype=torch.bfloat16) for each in range(size)]
            assert len(gathered) == size, f"gather() gives {len(gathered)} parts of {size}"
            assert all(map(torch.equal, gathered, expected)), "gather() gives other parts, or in another order"
        else:
            assert gathered is None, "gather() gives parts to others than the first process"


def _check_rows(
    dispatch: ExpertsDispatch,
    of_all: Callable[[Tensor], Tensor],
    x_MK: Tensor,
    index_MT: Tensor,
    num_experts: int,
) -> None:
    """Experts that multiply by a factor of their own: each row has to meet that of its expert, and to come back to its
    place, and so have gradients.
    """
    import torch

    from arctic_plugins.frozen import Mixture

    def products(first: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        assert sum(counts) == len(rows), "receive() counts other rows than it gives"
        own = factors[first : first + len(counts)]
        return rows * own.repeat_interleave(torch.tensor(counts)).unsqueeze(-1)

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
    assert close(y_MK, x_MK * by_token), "a row met another expert, or came back to another place"
    assert close(of_rows, scale_MK * by_token), "gradients of rows went another way"
    elsewhere = torch.ones(num_experts, dtype=torch.bool)
    elsewhere[here] = False
    assert not found[elsewhere].any(), "an expert of another process computed here"
    assert close(of_all(found), of_all(expected)), "gradients of experts are not those of all rows"
