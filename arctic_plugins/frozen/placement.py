"""Placements: where encoded bytes live when not with their module, and how they are borrowed for one computation.

A frozen weight that no placement takes is *resident*: its bytes are the module's own parameters, and nothing here is
involved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from arctic_plugins.errors import ClaimError
from arctic_plugins.frozen.codec import Buffers

__all__ = ["Handle", "LeaseOrder", "Placement", "chain"]


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
