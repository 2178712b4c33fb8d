"""Expert dispatch: how rows come to the experts that compute with them, and back. The default keeps them where they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

__all__ = ["Exchange", "ExpertsDispatch"]


class Exchange(ABC):
    """One call's way of rows to their experts and back, started by :meth:`ExpertsDispatch.send`. Its steps are called once each, in this order."""

    @abstractmethod
    def receive(self) -> tuple[Tensor, Sequence[int]]:
        """Wait for the rows of this process's experts: ``[rows, K]`` sorted by expert, and how many each has."""

    @abstractmethod
    def send_back(self, rows_RK: Tensor) -> None:
        """Start to return what the experts made of the rows."""

    @abstractmethod
    def receive_back(self) -> Tensor:
        """Wait for what was made of the rows given to ``send``, in their order."""


class ExpertsDispatch(ABC):
    """What fills the slot ``experts_dispatch``: one object serves all mixtures of a model.

    Its experts are held by this process from loading on; parameters below the module of the experts are this process's own, for gradients,
    clipping and saving.
    """

    experts_implementation: ClassVar[str] = "eager"
    """Name of the experts function in transformers that computes plain experts through a dispatch (``module.dispatch``)."""

    @abstractmethod
    def local(self, num_experts: int) -> slice:
        """Which of so many experts this process holds.

        Raises:
            ClaimError: they cannot be divided among the processes.
        """

    @abstractmethod
    def send(self, rows_RK: Tensor, counts: Sequence[int]) -> Exchange:
        """Start to bring ``rows_RK``, sorted by expert, to the processes that hold the experts; ``counts`` has the rows of each of all experts.

        Collective: processes call it equally often, in the same order. Gradients flow back the same way.
        """

    def keep(self, index_MT: Tensor, weights_MT: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Change routing before anything is sent, while training: an index of ``num_experts`` goes nowhere. Default: nothing changes."""
        return index_MT, weights_MT

    @abstractmethod
    def gather(self, local: Tensor) -> Tensor | None:
        """Collective: the whole of what has one ``local`` slice (along the first dimension) in each process, in the first process of all; None elsewhere."""
