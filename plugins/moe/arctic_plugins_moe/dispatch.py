"""Expert parallelism: an all-to-all sends tokens to the processes that hold their experts, and back.

Gradients travel the same way. Processes have different batches. With N processes for one copy of the experts and W
processes in total, the experts of a process see the tokens of N processes, and W / N processes hold the same experts.
No token is dropped unless a capacity is set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from arctic_plugins import world_size
from arctic_plugins.errors import ClaimError, ConfigError
from arctic_plugins.frozen import DispatchedTokens, ExpertsDispatch, LocalTokens
from arctic_plugins.patches import private
from arctic_plugins_moe.config import MoEConfig
from arctic_plugins_moe.experts import IMPLEMENTATION
from arctic_plugins_moe.router import Capacity

__all__ = ["ExpertParallel"]


class ExpertParallel(ExpertsDispatch):
    """Dispatch in which neighbors by rank together hold one copy of the experts, in the order of their ranks.

    Args:
        options: ``expert_parallel``, ``overlap_degree``, ``capacity_factor`` and ``min_capacity``.
    """

    experts_implementation = IMPLEMENTATION
    option = "plugins.moe.expert_parallel"

    def __init__(self, options: MoEConfig) -> None:
        self.size, self.overlap_degree = options.expert_parallel, options.overlap_degree
        self.capacity = (
            None if options.capacity_factor is None else Capacity(options.capacity_factor, options.min_capacity)
        )
        self._parts: dist.ProcessGroup | None = None
        self._copies: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return dist.get_rank() % self.size if self.size > 1 else 0

    @property
    def parts(self) -> dist.ProcessGroup:
        """The processes that together hold one copy of the experts.

        Raises:
            ConfigError: the number of processes does not fit, or torch.distributed is not initialized.
        """
        if self._parts is None:
            self._make_groups()
        assert self._parts is not None
        return self._parts

    def _make_groups(self) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                f"{self.option} is {self.size}, but torch.distributed is not initialized (processes started: "
                f"{world_size()})",
                fix="start several ('arctic train --nproc', torchrun); in a script, create the TrainingArguments "
                "before the model",
            )
        world = dist.get_world_size()
        if world % self.size:
            raise ConfigError(
                f"{self.option} is {self.size} with {world} processes",
                expected=f"a divisor of {world}",
                fix="correct it",
            )
        # Every process must take part in creating every group. The groups are separate from DDP's, so that its
        # collectives cannot come in between.
        parts = [list(range(first, first + self.size)) for first in range(0, world, self.size)]
        copies = [list(range(first, world, self.size)) for first in range(self.size)]
        self._parts, _ = dist.new_subgroups_by_enumeration(parts)
        self._copies, _ = dist.new_subgroups_by_enumeration(copies)

    def local(self, num_experts: int) -> slice:
        if self.size == 1:
            return slice(0, num_experts)
        if num_experts % self.size:
            raise ClaimError(
                f"{self.option} is {self.size}, but the model has {num_experts} experts",
                expected=f"a divisor of {num_experts}",
                fix="correct it",
            )
        _ = self.parts  # create groups while loading, so that errors are raised before weights are read
        each = num_experts // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def pieces(self, num_experts: int) -> list[int]:
        (whole,) = super().pieces(num_experts)
        degree = 1 if self.size == 1 else min(self.overlap_degree, whole)
        return [whole // degree + (piece < whole % degree) for piece in range(degree)]

    def dispatch(self, rows_RK: Tensor, counts: Sequence[Tensor]) -> Sequence[DispatchedTokens]:
        if self.size == 1:
            return [LocalTokens(rows_RK, own) for own in counts]
        if not self.attached and _active_ddp()() is not None:
            raise ConfigError(
                "DDP copied the first process's experts to all processes, because the trainer was not attached",
                fix="call attach(trainer, stack) before trainer.train()",
            )
        sent = torch.cat([own.view(self.size, -1) for own in counts], 1)
        received = torch.empty_like(sent)
        # This is synchronous, because the sizes must be known before rows arrive. The sizes of all pieces are sent at
        # once; otherwise those of the second piece would wait for the rows of the first.
        dist.all_to_all_single(received, sent, group=self.parts)
        sizes = [len(own) // self.size for own in counts]
        rows = rows_RK.split([int(own.sum()) for own in counts])
        pieces = zip(rows, sent.split(sizes, 1), received.split(sizes, 1), strict=True)
        return [_AllToAll(*piece, self.parts) for piece in pieces]

    def apply_capacity(self, index_MT: Tensor, weights_MT: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        return (
            (index_MT, weights_MT) if self.capacity is None else self.capacity.apply(index_MT, weights_MT, num_experts)
        )

    def sum_over_copies(self, tensor: Tensor) -> None:
        if self.size > 1 and dist.get_world_size() > self.size:
            dist.all_reduce(tensor, group=self._copies)

    def sum_over_parts(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.parts)

    def gather(self, local: Tensor) -> list[Tensor] | None:
        rank = dist.get_rank()
        if rank >= self.size:
            return None
        flat = local.detach().contiguous().view(-1).view(torch.uint8)  # bytes, because gloo does not support all dtypes
        if rank > 0:
            dist.send(flat, 0, group=self.parts)
            return None
        gathered = [local.detach().cpu()]
        for source in range(1, self.size):
            part = torch.empty_like(flat)
            dist.recv(part, source, group=self.parts)
            gathered.append(part.view(local.dtype).view(local.shape).cpu())
        return gathered


@cache
def _active_ddp() -> Callable[[], Any]:
    why = "no public function tells a module whether DDP's forward is running"
    found: Callable[[], Any] = private(DistributedDataParallel, "_get_active_ddp_module", why=why, read_in="torch 2.13")
    return found


class _AllToAll(DispatchedTokens):
    """The rows of one piece; ``sent`` and ``received`` are numbers of rows, ``[processes, experts of each]``."""

    def __init__(self, rows: Tensor, sent: Tensor, received: Tensor, group: dist.ProcessGroup) -> None:
        self.group = group
        self.sent, self.received = sent.sum(1).tolist(), received.sum(1).tolist()
        self.counts = received.sum(0)
        # Arriving rows are sorted by sender, then by expert.
        experts = (
            torch.arange(received.shape[1], device=rows.device)
            .repeat(len(received))
            .repeat_interleave(received.reshape(-1))
        )
        self.order = experts.argsort(stable=True)
        self.trip = _Trip(group, self.sent, self.received)
        self.arriving: Tensor = _Start.apply(rows, self.trip)

    def receive(self) -> tuple[Tensor, Tensor]:
        rows: Tensor = _Finish.apply(self.arriving, self.trip)
        return rows[self.order], self.counts

    def combine(self, rows_RK: Tensor) -> None:
        by_sender = torch.empty_like(self.order).scatter_(
            0, self.order, torch.arange(len(self.order), device=self.order.device)
        )
        self.trip = _Trip(self.group, self.received, self.sent)
        self.arriving = _Start.apply(rows_RK[by_sender], self.trip)

    def combined(self) -> Tensor:
        rows: Tensor = _Finish.apply(self.arriving, self.trip)
        return rows


class _Trip:
    """An all-to-all of rows, and of their gradients in the other direction.

    Each is started in one place and waited for in another.
    """

    def __init__(self, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> None:
        self.group, self.sent, self.received = group, sent, received
        self._work: tuple[Any, Tensor, Tensor] | None = None

    def start(self, rows: Tensor, *, back: bool = False) -> Tensor:
        """Start the exchange and return a buffer that is filled once :meth:`wait` returns."""
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(arriving, rows, received, sent, group=self.group, async_op=True)
        self._work = work, rows, arriving  # rows must stay alive until they are sent
        return arriving

    def wait(self) -> Tensor:
        """Wait for the exchange and return the filled buffer of :meth:`start`."""
        assert self._work is not None
        work, _, arriving = self._work
        work.wait()
        self._work = None
        return arriving


class _Start(torch.autograd.Function):
    """The start of a trip, whose result is available after :class:`_Finish`.

    In the backward pass it waits for the gradients that :class:`_Finish` has sent. Autograd runs operations in reverse
    order, so what is computed between the two in the forward pass is also computed between them in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.start(rows)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.wait()
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.trip.start(grads[0], back=True)
        return grads[0], None  # has the right shape; its values are not read
