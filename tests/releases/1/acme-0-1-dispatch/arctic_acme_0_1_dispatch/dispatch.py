"""The dispatch: how rows reach the processes that hold their experts, and come back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.distributed as dist
from arctic_plugins.errors import ClaimError, ConfigError
from arctic_plugins.frozen import DispatchedTokens, ExpertsDispatch, LocalTokens
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single

__all__ = ["Acme01DispatchDispatch"]


class Acme01DispatchDispatch(ExpertsDispatch):
    """An all-to-all among ``size`` neighbors by rank, each of which holds as many experts."""

    experts_implementation = "acme-0-1-dispatch"
    option = "plugins.acme-0-1-dispatch.processes"

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    def rank(self) -> int:
        return dist.get_rank() % self.size if self.size > 1 else 0

    @cached_property
    def groups(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """The processes that hold one copy of the experts, and those that hold the same experts."""
        if not dist.is_initialized() or dist.get_world_size() % self.size:
            raise ConfigError(
                f"{self.option} is {self.size}, which does not divide the number of processes",
                fix="start a multiple of that with 'arctic train RECIPE --nproc' or torchrun",
            )
        world = dist.get_world_size()
        parts, _ = dist.new_subgroups_by_enumeration(
            [list(range(first, first + self.size)) for first in range(0, world, self.size)]
        )
        copies, _ = dist.new_subgroups_by_enumeration(
            [list(range(first, world, self.size)) for first in range(self.size)]
        )
        return parts, copies

    def local(self, num_experts: int) -> slice:
        if num_experts % self.size:
            raise ClaimError(
                f"{self.option} is {self.size}, but the model has {num_experts} experts",
                expected=f"a divisor of {num_experts}",
            )
        _ = self.size > 1 and self.groups  # made while loading, by all processes
        own = num_experts // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def dispatch(self, rows_RK: Tensor, counts: Sequence[Tensor]) -> Sequence[DispatchedTokens]:
        [sent] = counts  # the experts of a process are one piece, see `pieces`
        if self.size == 1:
            return [LocalTokens(rows_RK, sent)]
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.groups[0])
        return [_Tokens(rows_RK, sent.view(self.size, -1), received.view(self.size, -1), self.groups[0])]

    def sum_over_copies(self, tensor: Tensor) -> None:
        if self.size > 1:
            dist.all_reduce(tensor, group=self.groups[1])

    def sum_over_parts(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.groups[0])

    def gather(self, local: Tensor) -> list[Tensor] | None:
        if self.size == 1:
            return [local.cpu()] if not dist.is_initialized() or dist.get_rank() == 0 else None
        if dist.get_rank() >= self.size:
            return None
        flat = local.detach().contiguous().view(-1).view(torch.uint8)  # bytes: gloo does not know every dtype
        parts = [torch.empty_like(flat) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(flat, parts, group_dst=0, group=self.groups[0])
        return None if parts is None else [part.view(local.dtype).view(local.shape).cpu() for part in parts]


class _Tokens(DispatchedTokens):
    """Rows of one layer; ``sent`` and ``received`` are numbers of rows, ``[processes, experts of each]``."""

    def __init__(self, rows_RK: Tensor, sent: Tensor, received: Tensor, group: dist.ProcessGroup) -> None:
        self.group, self.counts = group, received.sum(0)
        self.sent, self.received = sent.sum(1).tolist(), received.sum(1).tolist()
        experts = torch.arange(received.shape[1], device=rows_RK.device).repeat(len(received))
        self.order = experts.repeat_interleave(received.reshape(-1)).argsort(stable=True)  # by expert, then sender
        self.rows = self._exchange(rows_RK, self.sent, self.received)

    def receive(self) -> tuple[Tensor, Tensor]:
        return self.rows[self.order], self.counts

    def combine(self, rows_RK: Tensor) -> None:
        self.rows = self._exchange(rows_RK[self.order.argsort()], self.received, self.sent)

    def combined(self) -> Tensor:
        return self.rows

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send and receive numbers of rows to and from each process. Gradients travel back."""
        arriving = rows.new_empty(sum(received), *rows.shape[1:])
        result: Tensor = all_to_all_single(arriving, rows.contiguous(), received, sent, group=self.group)
        return result
