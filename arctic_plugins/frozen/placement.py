"""Placements: where encoded bytes live when not with their module, and how they are borrowed for one computation.

A frozen weight that no placement takes is *resident*: its bytes are the module's own parameters, and nothing here is
involved.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from arctic_plugins.errors import ClaimError
from arctic_plugins.frozen.codec import Buffers

__all__ = ["FetchedHandle", "Handle", "LeaseOrder", "Placement", "Prefetch", "chain"]

Fetched = TypeVar("Fetched")


class Handle(ABC):
    """One weight's encoded bytes, wherever they are. Immutable: a changed weight gets a new handle."""

    collective: bool = False
    """Whether the bytes are spread over processes: then all of them must lease, and export, the same weights in the
    same order.
    """

    @abstractmethod
    def lease(self, device: torch.device) -> AbstractContextManager[Buffers]:
        """Borrow the buffers on ``device``, where they are computed with. Leases nest; what they give must not be kept
        after they end.
        """

    @abstractmethod
    def export(self) -> dict[str, Tensor]:
        """The whole buffers, for saving."""

    def __deepcopy__(self, memo: dict[int, object]) -> Handle:
        return self  # a copy of the module borrows the same bytes


class Placement(ABC):
    """Takes encoded buffers in, one weight at a time, while a model is loading. One object serves a whole model.

    Placements are chained in the order of the stack: what an outer one keeps (a process's part of a weight) the next
    one may put elsewhere.
    """

    collective: bool = False
    """Whether it spreads a weight over processes: not for weights that differ between them, those of experts that are
    dispatched.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> Placement:
        return self  # one object serves every copy of a model and of its config

    def plan(self, nbytes: Mapping[str, int]) -> dict[str, int]:
        """Called once, before anything is read: choose which weights to take.

        Args:
            nbytes: name in the claim -> encoded bytes of every weight for which this placement was claimed, in the
                order of the model; in this process, after what comes before it in a chain.

        Returns:
            Name -> bytes that stay on the compute device, of those that it takes. The default takes all, and leaves
                nothing there.

        Raises:
            UserError: what is asked for is impossible, or there is no room.
        """
        return dict.fromkeys(nbytes, 0)

    @abstractmethod
    def hold(self, name: str, buffers: Buffers, inner: Placement | None = None) -> Handle:
        """Take ``buffers`` of the weight called ``name`` (the parameter's dotted name) over.

        Args:
            name: the parameter's dotted name.
            buffers: freed when the caller lets go of them, unless the placement keeps them.
            inner: the next placement of a chain, to which goes what this one would keep; one that keeps nothing here
                raises ClaimError.
        """

    def describe(self) -> str:
        """Where the bytes are, for people: ``disk``."""
        return type(self).__name__.lower()


class _Chain(Placement):
    def __init__(self, outer: Placement, inner: Placement) -> None:
        self.outer, self.inner = outer, inner

    def hold(self, name: str, buffers: Buffers, inner: Placement | None = None) -> Handle:
        if inner is not None:
            raise ClaimError("a chain of placements has no further one")
        return self.outer.hold(name, buffers, self.inner)

    def describe(self) -> str:
        return f"{self.outer.describe()}, {self.inner.describe()}"


def chain(placements: Sequence[Placement]) -> Placement:
    """One placement that hands bytes through ``placements``, which are not empty, in their order."""
    *outer, last = placements
    for placement in reversed(outer):
        last = _Chain(placement, last)
    return last


class LeaseOrder:
    """Learns in which order weights are leased, and says which come next.

    A successor is remembered for every two leases in a row, so that the way back through a model (backward, or a
    checkpointed layer computed again) is told from the way there.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[str, str], str] = {}
        self._last = ("", "")

    def leased(self, name: str) -> None:
        """Record that ``name`` is leased now."""
        self._next[self._last] = name
        self._last = (self._last[1], name)

    def upcoming(self, count: int) -> list[str]:
        """At most ``count`` names that were leased next when the last two leases were as they are now, without the one
        leased last.
        """
        at = self._last
        found: list[str] = []
        while len(found) < count and (name := self._next.get(at)) is not None:
            if name in found or name == self._last[1]:
                break
            found.append(name)
            at = (at[1], name)
        return found


class FetchedHandle(Handle, Generic[Fetched]):
    """One weight that is brought when it is leased, or ahead of that: leases are counted, and all that overlap share
    what was brought.

    Subclasses say how it comes (:meth:`fetch`), how it is used (:meth:`buffers`), and what becomes of it
    (:meth:`release`, :meth:`drop`).

    Args:
        name: the parameter's dotted name.
        prefetch: of the placement, which has to be told of the handle with :meth:`Prefetch.add`.
    """

    def __init__(self, name: str, prefetch: Prefetch) -> None:
        self.name, self.prefetch = name, prefetch
        self.leases = 0
        """How many there are now."""
        self._fetched: Any = None

    @abstractmethod
    def fetch(self, device: torch.device, at: FetchedHandle[Any]) -> Fetched:
        """Start to bring the bytes to ``device``. ``at`` is leased now: this weight itself, or another one, ahead of
        which it is brought. Must not wait.
        """

    @abstractmethod
    def buffers(self, fetched: Fetched, device: torch.device) -> Buffers:
        """Wait for what :meth:`fetch` has started, and give the buffers. Called for every lease."""

    def release(self, fetched: Fetched) -> None:
        """The last lease has ended; or it failed, as :meth:`buffers` raised an error."""

    def drop(self, fetched: Fetched) -> None:
        """It was brought ahead of time, and something else was leased. By default it is released."""
        self.release(fetched)

    @contextmanager
    def lease(self, device: torch.device) -> Iterator[Buffers]:
        with self.prefetch.lock:
            if not self.leases:
                self._fetched = self.prefetch.take(self, device)
            self.leases += 1
            fetched: Fetched = self._fetched
        try:
            yield self.buffers(fetched, device)
        finally:
            with self.prefetch.lock:
                self.leases -= 1
                if last := not self.leases:
                    self._fetched = None
            if last:
                self.release(fetched)


class Prefetch:
    """What a placement brings ahead of use: the next ``ahead`` weights in the order that it saw before."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self.lock = threading.RLock()
        """Held while leases begin and end, and fetches start."""
        self.order = LeaseOrder()
        self.pending: dict[FetchedHandle[Any], Any] = {}
        """Brought ahead of time, or on the way -> what :meth:`FetchedHandle.fetch` gave."""
        self._weights: dict[str, FetchedHandle[Any]] = {}

    def add(self, weight: FetchedHandle[Any]) -> None:
        """Take ``weight`` for the one of its name, in place of an earlier one."""
        self._weights[weight.name] = weight

    def take(self, weight: FetchedHandle[Fetched], device: torch.device) -> Fetched:
        """What was brought of ``weight``, which is leased now, or is on the way. Starts to bring what was leased next
        the last time, and drops what was brought and is not among that. The caller holds the lock.
        """
        self.order.leased(weight.name)
        fetched: Fetched = self.pending.pop(weight) if weight in self.pending else weight.fetch(device, weight)
        names = self.order.upcoming(self.ahead)
        upcoming = [other for name in names if (other := self._weights.get(name)) is not None and not other.leases]
        for other in [other for other in self.pending if other not in upcoming]:
            other.drop(self.pending.pop(other))
        for other in upcoming:
            if other not in self.pending:
                self.pending[other] = other.fetch(device, weight)
        return fetched
