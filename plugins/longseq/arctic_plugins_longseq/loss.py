"""Cross-entropy of a language model that never holds the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["default_tile", "tiled_cross_entropy"]

TILE_BYTES = 32 << 20


def default_tile(vocabulary: int) -> int:
    """Return the number of tokens whose logits take :data:`TILE_BYTES` in float32."""
    return max(1, TILE_BYTES // (4 * vocabulary))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of tokens that count depends on the data
def tiled_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    tile: int,
    ignore_index: int = -100,
) -> Tensor:
    """Compute ``cross_entropy(head(hidden).float(), labels, reduction="sum")`` tile by tile, with its gradients.

    Logits exist for ``tile`` tokens at a time, and are not computed for ignored tokens. Gradients are computed along
    with the loss, while a tile's logits exist (as in Hsu et al., "Liger Kernel", 2024), so nothing is computed twice;
    those of ``parameters`` are summed in float32.

    Args:
        hidden: ``[..., K]``.
        labels: ``[...]``, for the same positions: already shifted.
        head: ``[tokens, K] -> [tokens, V]``; any module that treats each token separately.
        parameters: the parameters of ``head`` that may receive gradients.
        tile: the number of tokens in a tile.
        ignore_index: the label of tokens that do not count.

    Returns:
        The sum over tokens, in float32.
    """
    with saved_tensors_hooks(_as_it_is, _as_it_is):  # others would move them to host memory, and at once back
        total: Tensor = _TiledLoss.apply(
            hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), head, tile, ignore_index, *parameters
        )
    return total


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MK: Tensor,
        labels_M: Tensor,
        head: Callable[[Tensor], Tensor],
        tile: int,
        ignore_index: int,
        *parameters: Tensor,
    ) -> Tensor:
        for_hidden, trained = (
            ctx.needs_input_grad[0],
            [p for p, needed in zip(parameters, ctx.needs_input_grad[5:], strict=True) if needed],
        )
        differentiate = for_hidden or bool(trained)
        grad_MK = torch.zeros_like(hidden_MK) if for_hidden else None
        sums = [
            torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for parameter in trained
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden_MK.device)
        # nonzero waits for the device, once per call; computing the logits of tokens that do not count would cost more.
        for rows in (labels_M != ignore_index).nonzero().squeeze(1).split(tile):
            if not len(rows):
                continue
            x = hidden_MK[rows].detach().requires_grad_(for_hidden)
            with torch.set_grad_enabled(differentiate):
                logits = head(x)
            scores, label = logits.detach().log_softmax(-1, dtype=torch.float32), labels_M[rows, None]
            total -= scores.gather(1, label).sum()
            if not differentiate:
                continue
            scores.exp_().scatter_add_(
                1, label, scores.new_full(label.shape, -1.0)
            )  # softmax, minus one at the label: the gradient of the logits
            inputs = [*([x] if for_hidden else []), *trained]
            found = list(torch.autograd.grad(logits, inputs, scores.to(logits.dtype)))
            del logits, scores
            if grad_MK is not None:
                grad_MK[rows] = found.pop(0)
            for sum_, part in zip(sums, found, strict=True):
                sum_ += part
        ctx.for_hidden, ctx.needed = for_hidden, ctx.needs_input_grad[5:]
        ctx.save_for_backward(
            *([grad_MK] if grad_MK is not None else []), *(s.to(p.dtype) for s, p in zip(sums, trained, strict=True))
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = [saved * grads[0].to(saved.dtype) for saved in ctx.saved_tensors]
        hidden = found.pop(0) if ctx.for_hidden else None
        return (hidden, None, None, None, None, *(found.pop(0) if needed else None for needed in ctx.needed))
