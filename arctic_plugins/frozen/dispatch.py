"""Expert dispatch: how tokens reach their experts, and how the results are combined, when the experts of a mixture are
distributed over processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

__all__ = ["DispatchedTokens", "ExpertsDispatch", "LocalTokens", "local_parameters"]


class DispatchedTokens(ABC):
    """Rows on their way to some experts and back, as :meth:`ExpertsDispatch.dispatch` returns them.

    Each step is called once, in this order.
    """

    @abstractmethod
    def receive(self) -> tuple[Tensor, Tensor]:
        """Wait for the rows of this process's experts.

        Returns:
            The rows, ``[rows, K]``, sorted by expert, and the number of rows of each expert, int64 ``[E]`` on the same
                device.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def combine(self, rows_RK: Tensor) -> None:
        """Start returning the experts' outputs to the processes that the rows came from.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def combined(self) -> Tensor:
        """Wait for the outputs of the rows that were dispatched, in their original order.

        .. versionadded:: 0.1
        """


class LocalTokens(DispatchedTokens):
    """Rows whose experts are in this process: nothing travels."""

    def __init__(self, rows: Tensor, counts: Tensor) -> None:
        self.rows, self.counts = rows, counts

    def receive(self) -> tuple[Tensor, Tensor]:
        return self.rows, self.counts

    def combine(self, rows_RK: Tensor) -> None:
        self.rows = rows_RK

    def combined(self) -> Tensor:
        return self.rows


class ExpertsDispatch(ABC):
    """How tokens reach experts in other processes; fills the slot ``experts_dispatch``.

    One object serves all mixtures of a model. From loading on, ``size`` processes together hold one copy of the
    experts. With more processes, several copies are trained on different data. DDP does not synchronize the parameters
    of a process's own experts (:func:`local_parameters`).
    """

    experts_implementation: ClassVar[str] = "eager"
    """Name of the experts function in transformers that computes plain experts through ``module.dispatch``.

    .. versionadded:: 0.1
    """
    option: ClassVar[str] = "the plugin that spreads experts"
    """The option that sets :attr:`size`, as ``plugins.NAME.OPTION``. Hosts name it in their messages.

    .. versionadded:: 0.1
    """
    size: int
    """Number of processes that hold one copy of the experts; 1 if they are not distributed.

    .. versionadded:: 0.1
    """
    attached: bool = False
    """Whether a trainer that treats the experts of each process separately is attached.

    .. versionadded:: 0.1
    """

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertsDispatch:
        return self  # one object serves every copy of a model and of its config

    @property
    @abstractmethod
    def rank(self) -> int:
        """Rank of this process among those that hold one copy of the experts.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def local(self, num_experts: int) -> slice:
        """Return which of ``num_experts`` experts this process holds.

        Raises:
            UserError: the experts cannot be divided among the processes, or there is no process group.

        .. versionadded:: 0.1
        """

    def pieces(self, num_experts: int) -> list[int]:
        """Return how this process's experts are divided into pieces: the number of experts in each.

        The rows of one piece travel while another is computed. All processes have the same pieces. The default is one.

        .. versionadded:: 0.1
        """
        here = self.local(num_experts)
        return [here.stop - here.start]

    @abstractmethod
    def dispatch(self, rows_RK: Tensor, counts: Sequence[Tensor]) -> Sequence[DispatchedTokens]:
        """Start sending rows to the processes that hold their experts.

        Collective: all processes call it the same number of times, in the same order. Gradients travel back the same
        way.

        Args:
            rows_RK: sorted by piece (see :meth:`pieces`), then by expert.
            counts: for each piece, the number of rows of each of its experts in all processes, those of the first
                process first; int64, on the device of the rows.

        Returns:
            One object for each piece. All pieces are under way; processes finish them in the same order.

        .. versionadded:: 0.1
        """

    def apply_capacity(self, index_MT: Tensor, weights_MT: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Change the routing before anything is sent, in training only.

        An index of ``num_experts`` drops the token for that expert. The default drops nothing.

        Args:
            index_MT: experts of each token, int64.
            weights_MT: their weights.
            num_experts: of the whole mixture.

        Returns:
            Both, changed or not, in the same shapes.

        .. versionadded:: 0.1
        """
        return index_MT, weights_MT

    @abstractmethod
    def sum_over_copies(self, tensor: Tensor) -> None:
        """Collective: sum ``tensor`` in place over the processes that hold the same experts.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def sum_over_parts(self, tensor: Tensor) -> None:
        """Collective: sum ``tensor`` in place over the processes that together hold one copy of the experts.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def gather(self, local: Tensor) -> list[Tensor] | None:
        """Collective: gather ``local`` of the processes that hold the first copy, in the first process.

        Returns:
            The tensors in order of rank, in host memory; None in all other processes.

        .. versionadded:: 0.1
        """


def local_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, ExpertsDispatch]]:
    """Return the parameters of this process's own experts, by name, each with its dispatch.

    They include what adapters add to the experts that they wrap.
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
