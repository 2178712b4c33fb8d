"""Expert dispatch: how rows come to the experts that compute with them, and back, when processes share the experts of a
mixture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

__all__ = ["Exchange", "ExpertsDispatch", "Stay", "local_parameters"]


class Exchange(ABC):
    """The way of rows to some experts and back, started by :meth:`ExpertsDispatch.send`. Its steps are called once
    each, in this order.
    """

    @abstractmethod
    def receive(self) -> tuple[Tensor, Sequence[int]]:
        """Wait for the rows of this process's experts among them: ``[rows, K]`` sorted by expert, and how many each
        has.
        """

    @abstractmethod
    def send_back(self, rows_RK: Tensor) -> None:
        """Start to return what the experts made of the rows."""

    @abstractmethod
    def receive_back(self) -> Tensor:
        """Wait for what was made of the rows given to ``send``, in their order."""


class Stay(Exchange):
    """Rows that are with their experts already."""

    def __init__(self, rows: Tensor, counts: Sequence[int]) -> None:
        self.rows, self.counts = rows, counts

    def receive(self) -> tuple[Tensor, Sequence[int]]:
        return self.rows, self.counts

    def send_back(self, rows_RK: Tensor) -> None:
        self.rows = rows_RK

    def receive_back(self) -> Tensor:
        return self.rows


class ExpertsDispatch(ABC):
    """What fills the slot ``experts_dispatch``: one object serves all mixtures of a model.

    ``size`` processes hold one copy of the experts together, each from loading on; when there are more, several copies
    are trained on different data. Parameters of a process's own experts (:func:`local_parameters`) are none of DDP's
    business.
    """

    experts_implementation: ClassVar[str] = "eager"
    """Name of the experts function in transformers that computes plain experts through ``module.dispatch``."""
    option: ClassVar[str] = "the plugin that spreads experts"
    """What says :attr:`size` in a recipe, ``plugins.NAME.OPTION``: hosts call it so in their messages."""
    size: int
    """Processes that hold one copy; 1 when nothing is spread."""
    attached: bool = False
    """Whether a trainer has been told to leave the experts of processes apart."""

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertsDispatch:
        return self  # one object serves every copy of a model and of its config

    @property
    @abstractmethod
    def rank(self) -> int:
        """This process's place among them."""

    @abstractmethod
    def local(self, num_experts: int) -> slice:
        """Which of so many experts this process holds.

        Raises:
            UserError: they cannot be divided among the processes, or there are no processes.
        """

    def pieces(self, num_experts: int) -> list[int]:
        """How many of this process's experts are computed together, piece after piece: the rows of one travel while
        another is computed.

        The same in all processes. The default is one piece.
        """
        here = self.local(num_experts)
        return [here.stop - here.start]

    @abstractmethod
    def send(self, rows_RK: Tensor, counts: Sequence[Sequence[int]]) -> Sequence[Exchange]:
        """Start to bring rows to the processes that hold their experts.

        Collective: processes call it equally often, in the same order. Gradients flow back the same way.

        Args:
            rows_RK: sorted by piece (see :meth:`pieces`), then by expert.
            counts: for each piece, the rows of each of the experts that processes have in it, those of the first
                process first.

        Returns:
            An exchange for each piece. Those of all pieces have started; processes finish them in the same order.
        """

    def keep(self, index_MT: Tensor, weights_MT: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Change routing before anything is sent, while training: an index of ``num_experts`` goes nowhere. The default
        changes nothing.
        """
        return index_MT, weights_MT

    @abstractmethod
    def sum_over_copies(self, tensor: Tensor) -> None:
        """Collective: add up, in place, what the processes with the same experts have."""

    @abstractmethod
    def sum_over_parts(self, tensor: Tensor) -> None:
        """Collective: add up, in place, what the processes with the experts of one copy have."""

    @abstractmethod
    def gather(self, local: Tensor) -> list[Tensor] | None:
        """Collective: what the processes of the first copy have, in order of rank and host memory, in the first process
        of all; None elsewhere.
        """


def local_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, ExpertsDispatch]]:
    """Name -> parameter of this process's own experts, and the dispatch. What adapters add beside experts that they
    wrap is among them.
    """
    owners: dict[str, ExpertsDispatch] = {}
    for name, module in model.named_modules():
        dispatch = getattr(module, "dispatch", None)
        if isinstance(dispatch, ExpertsDispatch) and dispatch.size > 1:
            while name.endswith(".base_layer"):
                name = name.removesuffix(".base_layer")
            owners[f"{name}."] = dispatch
    return {
        name: (parameter, dispatch)
        for name, parameter in model.named_parameters()
        for owner, dispatch in owners.items()
        if name.startswith(owner)
    }
