"""The loss. Its signature is that of ``ForCausalLMLoss`` in transformers 5.19.0 (``loss/loss_utils.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

__all__ = ["tiled_cross_entropy"]


def tiled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    tile: int,
    **_: Any,
) -> Tensor:
    """Return the cross-entropy of the next token, in float32.

    Only the logits of ``tile`` tokens are widened to float32 at a time, and again in the backward pass.

    Args:
        logits: ``[..., T, V]``, in any dtype.
        labels: ``[..., T]``, not shifted.
        vocab_size: V.
        num_items_in_batch: what the sum is divided by; None: the number of labels.
        ignore_index: the label of tokens that do not count.
        shift_labels: labels that are shifted already, used instead of ``labels``.
        tile: number of tokens.
    """
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows, wanted = logits.view(-1, vocab_size), shift_labels.reshape(-1).to(logits.device)
    total = torch.zeros((), device=logits.device)
    for part, label in zip(rows.split(tile), wanted.split(tile), strict=True):
        total = total + checkpoint(_sum, part, label, ignore_index, use_reentrant=False)
    return total / ((wanted != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


def _sum(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
