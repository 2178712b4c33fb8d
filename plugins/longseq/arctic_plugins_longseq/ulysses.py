"""Sequence parallelism (Jacobs et al., "DeepSpeed Ulysses", 2023).

A process holds some of the tokens of a text, and in attention all tokens for some of the heads. Nothing here depends on
a model or a host. Shapes: B rows, H heads, S tokens of one process, L tokens of all processes (``L = S * processes``),
D the head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["Heads", "Mask", "SequenceGroup", "Share", "Whole", "computing", "current"]

Mask: TypeAlias = "Tensor | BlockMask"
"""An attention mask, as the mask functions of a host build it."""

IGNORED = -100
"""The label of a token that does not count in the loss."""

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Keys that collators may add for flash attention: where packed texts begin.

Positions give the same information, and remain correct after padding.
"""


@dataclass(frozen=True)
class Heads:
    """The attention heads that a process computes: query heads ``first`` to ``last``, and their key-value heads."""

    first: int
    last: int
    groups: int
    """Number of query heads that share a key-value head, in the whole model."""

    @property
    def count(self) -> int:
        """The number of query heads."""
        return self.last - self.first

    @property
    def keys(self) -> slice:
        """The key-value heads, as a slice of those of the whole model."""
        return slice(self.first // self.groups, (self.last - 1) // self.groups + 1)

    @property
    def shared(self) -> int | None:
        """The number of query heads that share a key-value head in this process, or None if it is not uniform."""
        count = self.keys.stop - self.keys.start
        if count == 1 or (self.first % self.groups == 0 and self.last % self.groups == 0):
            return self.count // count
        return None

    def spread(self, x_BHLD: Tensor) -> Tensor:
        """Repeat this process's key-value heads, one for each query head: ``[B, keys, L, D] -> [B, count, L, D]``."""
        return x_BHLD[:, [head // self.groups - self.keys.start for head in range(self.first, self.last)]]

    @staticmethod
    @functools.cache
    def of(processes: int, heads: int, key_heads: int) -> tuple[Heads, ...]:
        """Return the heads of each process, split as evenly as possible; ``processes`` need not divide ``heads``."""
        cuts = [heads * rank // processes for rank in range(processes + 1)]
        return tuple(Heads(first, last, heads // key_heads) for first, last in itertools.pairwise(cuts))


@dataclass
class Whole:
    """The information about all tokens of a batch that attention needs. ``L`` includes the padding at the end."""

    sequence: SequenceGroup
    length: int
    """The length without the padding at the end."""
    positions: Tensor
    """``[B, L]``, or ``[1, L]``."""
    mask: Tensor | None
    """``[B, L]``, the batch's own mask, if it has one: False for padding."""
    masks: dict[Any, Mask | None] = field(default_factory=dict)
    """A cache for attention masks, which all layers share."""


class Share(dict[str, Any]):
    """A process's part of a batch."""

    whole: Whole


class SequenceGroup:
    """The processes that share a text: ``processes`` consecutive ranks.

    Every process of the world must create it at the same time.
    """

    def __init__(self, processes: int) -> None:
        self.size = processes
        world = range(dist.get_world_size())
        group, _ = dist.new_subgroups_by_enumeration([[*world[at : at + processes]] for at in world[::processes]])
        self.group: Any = group
        self.rank = dist.get_rank() % processes

    def share(self, batch: Mapping[str, Any], device: torch.device) -> Share:
        """Return this process's tokens of the first process's ``batch`` (``input_ids [B, L]`` and related tensors).

        Each token keeps the label of the next token (``shift_labels``) and its position in the text
        (``position_ids``). If the length of a text is not a multiple of the number of processes, padding is added at
        the end, which no token of the text attends to.
        """
        sent = [{name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}]
        dist.broadcast_object_list(sent, group=self.group, group_src=0, device=device)  # a collator may draw at random
        whole = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in sent[0].items()
            if name not in PACKING
        }
        rows, length = whole["input_ids"].shape
        whole.setdefault("position_ids", torch.arange(length, device=device).expand(rows, -1))
        if "labels" in whole:
            whole.setdefault("shift_labels", torch.nn.functional.pad(whole["labels"], (0, 1), value=IGNORED)[:, 1:])
        missing = -length % self.size
        tensors = {name: value for name, value in whole.items() if isinstance(value, Tensor)}
        by_token = {
            name: _padded(name, value, missing) for name, value in tensors.items() if value.shape[1:2] == (length,)
        }
        tokens = (length + missing) // self.size
        own = slice(self.rank * tokens, (self.rank + 1) * tokens)
        share = Share({**whole, **{name: value[:, own].contiguous() for name, value in by_token.items()}})
        mask = by_token.get("attention_mask")
        share.whole = Whole(self, length, by_token["position_ids"], None if mask is None else mask.bool())
        return share

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the processes, without gradients."""
        value = value.clone()
        dist.all_reduce(value, group=self.group)
        return value / self.size

    def to_heads(
        self, query_BHSD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Heads]:
        """Exchange this process's tokens of all heads for all tokens of its heads, in one collective.

        The results have the shape ``[B, heads of this process, L, D]``.
        """
        heads = Heads.of(self.size, query_BHSD.shape[1], key_BHSD.shape[1])
        own = heads[self.rank]
        sent = [[query_BHSD[:, h.first : h.last], key_BHSD[:, h.keys], value_BHSD[:, h.keys]] for h in heads]
        shapes = [part.shape for part in sent[self.rank]]
        sizes = [shape.numel() for shape in shapes]
        received = self._exchange(
            [torch.cat([part.flatten() for part in parts]) for parts in sent], [sum(sizes)] * self.size
        )
        columns = received.view(self.size, -1).split(sizes, 1)
        query, key, value = (
            column.reshape(self.size, *shape).movedim(0, 2).flatten(2, 3)
            for column, shape in zip(columns, shapes, strict=True)
        )
        return query, key, value, own

    def to_tokens(self, x_BLHD: Tensor, heads: int) -> Tensor:
        """Reverse the exchange for the output of attention: this process's tokens of all heads, ``[B, S, H, D]``."""
        rows, length, own, size = x_BLHD.shape
        tokens = length // self.size
        counts = [h.count for h in Heads.of(self.size, heads, heads)]
        sent = x_BLHD.view(rows, self.size, tokens, own, size).movedim(1, 0)
        sizes = [rows * tokens * count * size for count in counts]
        parts = self._exchange([part.flatten() for part in sent], sizes).split(sizes)
        return torch.cat([part.view(rows, tokens, count, size) for part, count in zip(parts, counts, strict=True)], 2)

    def _exchange(self, parts: list[Tensor], sizes: list[int]) -> Tensor:
        """Send each process its part, and receive a part of ``sizes`` elements from each."""
        received: Tensor = _AllToAll.apply(torch.cat(parts), [part.numel() for part in parts], sizes, self.group)
        return received


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, sent_sizes: list[int], sizes: list[int], group: Any) -> Tensor:
        ctx.backwards = (sizes, sent_sizes, group)
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, sizes, sent_sizes, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _AllToAll.apply(grads[0].contiguous(), *ctx.backwards), None, None, None


# Global to the process, not to a thread: on GPUs, autograd recomputes checkpoints in its own threads.
_current: Whole | None = None


def current() -> Whole | None:
    """Return the batch that is being computed, or None outside of :func:`computing`."""
    return _current


@contextmanager
def computing(share: Share) -> Iterator[None]:
    """Make attention see all tokens within the block, for the forward, backward and recomputation of ``share``."""
    global _current
    _current = share.whole
    try:
        yield
    finally:
        _current = None
        share.whole.masks.clear()


def _padded(name: str, value: Tensor, missing: int) -> Tensor:
    if not missing:
        return value
    if name == "position_ids":
        return torch.cat([value, value[:, -1:] + torch.arange(1, missing + 1, device=value.device)], 1)
    return torch.nn.functional.pad(value, (0, missing), value=IGNORED if "labels" in name else 0)
