"""How many weights to copy ahead of use, from measured times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from arctic_plugins.frozen import Gpu, Staged, Staging

__all__ = ["Pace", "choose_ahead", "pass_time"]

MOST = 64
"""Most weights ahead; also the largest number that a recipe may set."""
SLACK = 1.02
"""A depth is enough if a pass takes at most this many times as long as with the best one."""


def pass_time(copies: Sequence[float], computes: Sequence[float], ahead: int) -> float:
    """Return how long a pass takes whose i-th weight is copied in ``copies[i]`` and used for ``computes[i]``.

    Copies follow each other. A weight's copy begins when the one ``ahead + 1`` before it is no longer used, because it
    takes that one's place; its use begins when its copy, and the use before, have ended.
    """
    copied, used = 0.0, [0.0] * (ahead + 1)
    for index, (copy, compute) in enumerate(zip(copies, computes, strict=True)):
        copied = max(copied, used[index]) + copy
        used.append(max(copied, used[-1]) + compute)
    return used[-1]


def choose_ahead(copies: Sequence[float], computes: Sequence[float], sizes: Sequence[int], limit: int) -> int:
    """Return the smallest number of weights ahead that is nearly as fast as any whose ring takes at most ``limit``.

    "Nearly" is within :data:`SLACK`, by :func:`pass_time`. One weight ahead is always allowed.

    Args:
        copies: see :func:`pass_time`.
        computes: see :func:`pass_time`.
        sizes: bytes of each weight, once, in the order of use.
        limit: bytes.
    """
    allowed = [1]
    allowed += [ahead for ahead in range(2, min(MOST, len(sizes) - 1) + 1) if Staging.nbytes(sizes, ahead) <= limit]
    times = {ahead: pass_time(copies, computes, ahead) for ahead in allowed}
    return next(ahead for ahead in allowed if times[ahead] <= SLACK * min(times.values()))


@dataclass
class _Use:
    name: str
    nbytes: int
    copy: tuple[Any, Any] | None
    """Events before and after the copy, if it was timed."""
    before: Any
    """Event in the stream of the computation, before it waits for the copy."""
    after: Any
    """Event after it has waited."""


class Pace:
    """A measurement of copies and of the computation between them, over about a training step.

    The first ``3 * weights`` leases are left out: their order is being learned, and kernels are being tuned. The next
    ``3 * weights`` (forward, recomputation and backward) are timed with events, which are read once the last one has
    passed. A weight's use lasts until the next lease; how long its copy takes follows from its size and the bandwidth
    of all copies together.

    Args:
        gpu: the operations of the device.
        weights: how many weights are offloaded.
    """

    def __init__(self, gpu: Gpu, weights: int) -> None:
        self.gpu = gpu
        self.window = max(8, 3 * weights)
        self._leases = 0
        self._uses: list[_Use] = []

    @property
    def timed(self) -> bool:
        """Whether copies that start now should be timed."""
        return self._leases >= self.window

    def use(self, name: str, staged: Staged) -> Tensor:
        """Call ``staging.use(staged)`` at the beginning of a lease of the weight ``name``, and measure it."""
        self._leases += 1
        if self._leases <= self.window or len(self._uses) == self.window or self.gpu.capturing():
            return staged.staging.use(staged)
        stream = self.gpu.current(staged.staging.device)
        before = self.gpu.record(stream, timed=True)
        memory = staged.staging.use(staged)
        copy = None if staged.started is None else (staged.started, staged.ready)
        self._uses.append(_Use(name, len(memory), copy, before, self.gpu.record(stream, timed=True)))
        return memory

    def is_over(self) -> bool:
        """Return whether everything has been measured, without waiting for it."""
        return len(self._uses) == self.window and all(use.after.query() for use in reversed(self._uses))

    def decide(self, limit: int) -> tuple[list[int], int]:
        """Return the sizes of all weights in their order of use, and how many to copy ahead within ``limit`` bytes."""
        copied = [(use.nbytes, use.copy[0].elapsed_time(use.copy[1])) for use in self._uses if use.copy is not None]
        per_byte = sum(time for _, time in copied) / max(1, sum(nbytes for nbytes, _ in copied))
        copies = [use.nbytes * per_byte for use in self._uses]
        computes = [use.after.elapsed_time(after.before) for use, after in pairwise(self._uses)]
        sizes = list({use.name: use.nbytes for use in self._uses}.values())
        return sizes, choose_ahead(copies, [*computes, 0.0], sizes, limit)
