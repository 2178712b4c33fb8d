"""Placements: where encoded bytes are kept outside their module, and how they are borrowed for one computation.

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
    """The encoded bytes of one weight, wherever they are. Immutable: a changed weight gets a new handle."""

    collective: bool = False
    """Whether the bytes are spread over processes. All processes must then lease, and export, the same weights in the
    same order.

    .. versionadded:: 0.1
    """

    @abstractmethod
    def lease(self, device: torch.device) -> AbstractContextManager[Buffers]:
        """Borrow the buffers on ``device``, where they are used.

        Leases can be nested. The buffers must not be kept after the lease ends.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def export(self) -> dict[str, Tensor]:
        """Return the whole buffers, for saving.

        .. versionadded:: 0.1
        """

    def __deepcopy__(self, memo: dict[int, object]) -> Handle:
        return self  # a copy of the module borrows the same bytes


class Placement(ABC):
    """A place for encoded buffers, which takes them one weight at a time while a model is loading.

    One object serves a whole model. Placements are chained in the order of the stack: what an outer one keeps (a
    process's part of a weight), the next one may put elsewhere.
    """

    collective: bool = False
    """Whether it spreads a weight over processes. It then cannot take weights that differ between processes, which are
    those of dispatched experts.

    .. versionadded:: 0.1
    """

    def __deepcopy__(self, memo: dict[int, object]) -> Placement:
        return self  # one object serves every copy of a model and of its config

    def plan(self, nbytes: Mapping[str, int]) -> dict[str, int]:
        """Choose which weights to take. Called once, before anything is read.

        Args:
            nbytes: name in the claim -> encoded bytes of every weight for which this placement was claimed, in the
                order of the model. The bytes are those in this process, as left by the previous placements of a chain.

        Returns:
            For the weights that it takes, name -> bytes that stay on the compute device. The default takes all weights
                and leaves nothing there.

        Raises:
            UserError: the request is impossible, or there is not enough room.

        .. versionadded:: 0.1
        """
        return dict.fromkeys(nbytes, 0)

    @abstractmethod
    def hold(self, name: str, buffers: Buffers, inner: Placement | None = None) -> Handle:
        """Take over the ``buffers`` of the weight called ``name``.

        Args:
            name: the parameter's dotted name.
            buffers: freed when the caller lets go of them, unless the placement keeps them.
            inner: the next placement of a chain, which receives what this one would keep. A placement that keeps
                nothing in this process raises ClaimError.

        .. versionadded:: 0.1
        """

    def describe(self) -> str:
        """Return where the bytes are, for users, such as ``disk``.

        .. versionadded:: 0.1
        """
        return type(self).__name__.lower()


class _Chain(Placement):
    def __init__(self, outer: Placement, inner: Placement) -> None:
        self.outer, self.inner = outer, inner

    def hold(self, name: str, buffers: Buffers, inner: Placement | None = None) -> Handle:
        if inner is not None:
            raise ClaimError("a chain of placements cannot be followed by another placement")
        return self.outer.hold(name, buffers, self.inner)

    def describe(self) -> str:
        return f"{self.outer.describe()}, {self.inner.describe()}"


def chain(placements: Sequence[Placement]) -> Placement:
    """Return one placement that passes bytes through ``placements`` (at least one), in their order."""
    *outer, last = placements
    for placement in reversed(outer):
        last = _Chain(placement, last)
    return last


class LeaseOrder:
    """A record of the order in which weights are leased, which predicts what comes next.

    A successor is remembered for every two consecutive leases. This distinguishes the way back through a model
    (backward, or a checkpointed layer that is computed again) from the way there.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[str, str], str] = {}
        self._last = ("", "")

    def leased(self, name: str) -> None:
        """Record that ``name`` is being leased."""
        self._next[self._last] = name
        self._last = (self._last[1], name)

    def upcoming(self, count: int) -> list[str]:
        """Return at most ``count`` names that came next when the last two leases were the same as now.

        The weight leased last is not among them.
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
    """A weight that is fetched when it is leased, or ahead of that.

    Leases are counted, and all overlapping ones share what was fetched. Subclasses define how the weight is fetched
    (:meth:`fetch`), how it is used (:meth:`buffers`), and what becomes of it (:meth:`release`, :meth:`drop`).

    Args:
        name: the parameter's dotted name.
        prefetch: that of the placement, which must add the handle to it with :meth:`Prefetch.add`.
    """

    def __init__(self, name: str, prefetch: Prefetch) -> None:
        self.name, self.prefetch = name, prefetch
        self.leases = 0
        """Number of current leases."""
        self._fetched: Any = None

    @abstractmethod
    def fetch(self, device: torch.device, at: FetchedHandle[Any]) -> Fetched:
        """Start fetching the bytes to ``device``, without waiting.

        ``at`` is the weight that is being leased: this one, or another one ahead of which this one is fetched. In the
        latter case, None means that it cannot be fetched yet; the next lease asks again.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def buffers(self, fetched: Fetched, device: torch.device) -> Buffers:
        """Wait for what :meth:`fetch` has started, and return the buffers. Called for every lease.

        .. versionadded:: 0.1
        """

    def release(self, fetched: Fetched) -> None:
        """Let go of ``fetched``: the last lease has ended, or has failed because :meth:`buffers` raised an error.

        .. versionadded:: 0.1
        """

    def drop(self, fetched: Fetched) -> None:
        """Let go of ``fetched``: it was fetched ahead, but another weight was leased. The default releases it.

        .. versionadded:: 0.1
        """
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
    """The weights that a placement fetches ahead of use: the next ``ahead`` ones, in the order of the last time."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self.lock = threading.RLock()
        """Held while leases begin and end, and fetches start."""
        self.order = LeaseOrder()
        self.pending: dict[FetchedHandle[Any], Any] = {}
        """Weight that was fetched ahead, or is on its way -> the result of :meth:`FetchedHandle.fetch`."""
        self._weights: dict[str, FetchedHandle[Any]] = {}

    def add(self, weight: FetchedHandle[Any]) -> None:
        """Use ``weight`` under its name, in place of an earlier one."""
        self._weights[weight.name] = weight

    def take(self, weight: FetchedHandle[Fetched], device: torch.device) -> Fetched:
        """Return the result of fetching ``weight``, which is being leased. The caller holds the lock.

        Also start fetching the weights that were leased next the last time. Those that were fetched ahead but are not
        among them are dropped first, to make room.
        """
        self.order.leased(weight.name)
        names = self.order.upcoming(self.ahead)
        upcoming = [other for name in names if (other := self._weights.get(name)) is not None and not other.leases]
        for other in [other for other in self.pending if other is not weight and other not in upcoming]:
            other.drop(self.pending.pop(other))
        fetched: Fetched = self.pending.pop(weight) if weight in self.pending else weight.fetch(device, weight)
        for other in upcoming:
            if other not in self.pending and (ahead := other.fetch(device, weight)) is not None:
                self.pending[other] = ahead
        return fetched
