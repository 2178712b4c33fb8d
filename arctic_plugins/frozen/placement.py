"""Placements: where encoded bytes live when not with their module, and how they are borrowed for one computation.

A frozen weight that no placement claims is *resident*: its bytes are the module's own parameters, and nothing here is involved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from torch import Tensor

from arctic_plugins.frozen.codec import Buffers

__all__ = ["Handle", "Placement"]


class Handle(ABC):
    """One weight's encoded bytes, wherever they are. Immutable: a changed weight gets a new handle."""

    @abstractmethod
    def lease(self) -> AbstractContextManager[Buffers]:
        """Borrow the buffers on the compute device. Leases nest; what they give must not be kept after they end."""

    @abstractmethod
    def export(self) -> dict[str, Tensor]:
        """The whole buffers, for saving."""

    def __deepcopy__(self, memo: dict[int, object]) -> Handle:
        return self  # a copy of the module borrows the same bytes


class Placement(ABC):
    """Takes encoded buffers in, one weight at a time, while a model is loading. One object serves a whole stack."""

    def __deepcopy__(self, memo: dict[int, object]) -> Placement:
        return self  # one object serves every copy of a model and of its config

    @abstractmethod
    def hold(self, name: str, buffers: Buffers) -> Handle:
        """Take ``buffers`` of the weight called ``name`` (the parameter's dotted name); what the placement does not keep is freed when the caller
        lets go of it."""
