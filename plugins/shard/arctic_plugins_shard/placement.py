"""Encoded bytes that are spread over processes.

They are split without regard to their meaning, so any codec, shape and number of processes works.
"""

from __future__ import annotations

import atexit
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from queue import SimpleQueue
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from arctic_plugins import world_size
from arctic_plugins.errors import ArcticError, ConfigError
from arctic_plugins.frozen import Buffers, FetchedHandle, Handle, Placement, Prefetch
from arctic_plugins_shard.config import ShardConfig

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13

__all__ = ["ShardError", "ShardPlacement", "ShardedWeight"]

ALIGNMENT = 16
"""Buffers and parts are padded to multiples of this many bytes, so that they are aligned for any dtype."""


class ShardError(ArcticError):
    """The processes of a run have reached different modules."""


@dataclass
class _Gathered:
    """All parts of a weight, concatenated."""

    flat: Tensor
    ready: torch.cuda.Event | None = None


class ShardPlacement(Placement):
    """Placement that keeps a part of every weight in this process, and gathers all parts when the weight is leased.

    Every gather is preceded by a gather of two numbers, for the weight itself and for the weight that is being computed
    with. Processes that have reached different modules therefore detect it instead of waiting for each other. One
    thread issues all collectives, in the order of leases; the weights that were leased next the last time are gathered
    ahead.
    """

    collective = True

    def __init__(self, options: ShardConfig) -> None:
        self.options = options
        self.prefetch = Prefetch(options.prefetch)
        self.rank, self.size = 0, 1
        self._numbers: dict[int, str] = {}
        self._control: dist.ProcessGroup | None = None
        self._data: dist.ProcessGroup | None = None
        self._work: SimpleQueue[tuple[Future[_Gathered], ShardedWeight, torch.device, ShardedWeight] | None] = (
            SimpleQueue()
        )
        self._worker: threading.Thread | None = None
        self._spare: dict[tuple[int, torch.device], list[Tensor]] = defaultdict(list)
        self._lock = threading.Lock()  # guards the spare memory
        self._stream: torch.cuda.Stream | None = None

    def plan(self, nbytes: Mapping[str, int]) -> dict[str, int]:
        """Take all weights, or none if there is only one process.

        Raises:
            ConfigError: several processes were started, but torch.distributed is not initialized.
        """
        if not dist.is_initialized():
            if (started := world_size()) > 1:
                raise ConfigError(
                    f"{started} processes were started, but torch.distributed is not initialized",
                    fix="create the TrainingArguments before the model, or call torch.distributed.init_process_group()",
                )
            return {}
        if dist.get_world_size() == 1:
            return {}
        self._make_groups(self.options.group_size or dist.get_world_size())
        return {name: _part(size, self.size) for name, size in nbytes.items()}

    def _make_groups(self, size: int) -> None:
        world, timeout = dist.get_world_size(), timedelta(seconds=self.options.timeout)
        if world % size:
            raise ConfigError(
                f"plugins.shard.group_size is {size} with {world} processes",
                expected=f"a divisor of {world}",
                fix="correct it",
            )
        for first in range(0, world, size):  # every process must take part in creating every group
            ranks = list(range(first, first + size))
            control, data = dist.new_group(ranks, timeout, backend="gloo"), dist.new_group(ranks, timeout)
            if dist.get_rank() in ranks:
                self._control, self._data = control, data
        self.rank, self.size = dist.get_rank() % size, size

    def hold(self, name: str, buffers: Buffers, inner: Placement | None = None) -> ShardedWeight:
        layout, total = {}, 0
        for suffix, buffer in buffers.items():
            layout[suffix] = (total, buffer.shape, buffer.dtype)
            total += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
        length = _part(total, self.size)
        part = torch.zeros(length, dtype=torch.uint8, device=next(iter(buffers.values())).device)
        start = self.rank * length
        for suffix, buffer in buffers.items():
            offset = layout[suffix][0]
            first, last = max(start, offset), min(start + length, offset + buffer.nbytes)
            if first < last:
                part[first - start : last - start] = _bytes(buffer)[first - offset : last - offset]
        kept = part if inner is None else inner.hold(name, {"": part})
        weight = ShardedWeight(self, name, layout, kept)
        self.prefetch.add(weight)
        self._numbers[weight.number] = name
        return weight

    def describe(self) -> str:
        return f"1/{self.size} in each process"

    def gather(self, weight: ShardedWeight, device: torch.device, at: ShardedWeight) -> Future[_Gathered]:
        """Start to gather the parts of ``weight``, after the gathers that were started before; ``at`` is leased now."""
        if self._worker is None:
            # A daemon thread: a failed process must be able to exit although its gather never finishes.
            self._worker = threading.Thread(target=self._run, name="arctic-shard", daemon=True)
            self._worker.start()
            atexit.register(self._stop)
        future: Future[_Gathered] = Future()
        self._work.put((future, weight, device, at))
        return future

    def give_back(self, future: Future[_Gathered]) -> None:
        """Keep the memory for the next weight of the same size: new memory costs page faults.

        On GPUs, the allocator does this.
        """
        if future.cancelled() or future.exception() is not None or (gathered := future.result()).ready is not None:
            return
        with self._lock:
            self._spare[gathered.flat.numel(), gathered.flat.device].append(gathered.flat)

    def _run(self) -> None:
        while (task := self._work.get()) is not None:
            future, weight, device, at = task
            try:
                future.set_result(self._collect(weight, device, at))
            except Exception as error:  # raised where the weight is leased
                future.set_exception(error)

    def _stop(self) -> None:
        """Wait for the gathers that were started.

        A thread that is in a gather while Python shuts down would abort the process.
        """
        self._work.put(None)
        assert self._worker is not None
        self._worker.join(timeout=10)

    @torch.no_grad()
    def _collect(self, weight: ShardedWeight, device: torch.device, at: ShardedWeight) -> _Gathered:
        self._agree(weight, at)
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
        with (
            torch.cuda.stream(self._stream) if self._stream is not None else nullcontext(),
            weight.part(device) as part,
        ):
            with self._lock:
                spare = self._spare[part.numel() * self.size, device]
                flat = spare.pop() if spare else torch.empty(part.numel() * self.size, dtype=torch.uint8, device=device)
            all_gather(flat, part, group=self._data)
            return _Gathered(flat, self._stream.record_event() if self._stream is not None else None)

    def _agree(self, weight: ShardedWeight, at: ShardedWeight) -> None:
        """Check that all processes gather ``weight`` now and compute with ``at``."""
        mine = torch.tensor([at.number, weight.number])
        everyones = torch.empty(2 * self.size, dtype=torch.int64)
        try:
            all_gather(everyones, mine, group=self._control)
        except RuntimeError as error:
            raise ShardError(
                f"this process (rank {dist.get_rank()}) waited for the others to reach {weight.name}: "
                f"{str(error).splitlines()[0]}",
                expected="every process to compute with the same modules in the same order",
                fix="find what one process skips, or see the error of the process that stopped",
            ) from error
        for rank, theirs in enumerate(everyones.view(self.size, 2).tolist()):
            if theirs != mine.tolist():
                own, other = (at.number, theirs[0]) if theirs[0] != at.number else (weight.number, theirs[1])
                first = dist.get_rank() - self.rank
                raise ShardError(
                    f"rank {dist.get_rank()} is at {self._numbers[own]} while rank {first + rank} is at "
                    f"{self._numbers.get(other, 'another model')}",
                    expected="every process to compute with the same modules in the same order",
                    fix="find what one process skips",
                )


class ShardedWeight(FetchedHandle[Future[_Gathered]]):
    """A weight of which this process holds a part."""

    collective = True

    def __init__(
        self,
        placement: ShardPlacement,
        name: str,
        layout: dict[str, tuple[int, torch.Size, torch.dtype]],
        kept: Tensor | Handle,
    ) -> None:
        super().__init__(name, placement.prefetch)
        self.placement, self.layout, self.kept = placement, layout, kept
        self.number = int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "little")

    @contextmanager
    def part(self, device: torch.device) -> Iterator[Tensor]:
        """Yield this process's bytes, on ``device``."""
        if isinstance(self.kept, Handle):
            with self.kept.lease(device) as buffers:
                yield buffers[""]
        else:
            self.kept = self.kept.to(device)
            yield self.kept

    def fetch(self, device: torch.device, at: FetchedHandle[Any]) -> Future[_Gathered]:
        return self.placement.gather(self, device, cast(ShardedWeight, at))

    def buffers(self, fetched: Future[_Gathered], device: torch.device) -> Buffers:
        """Return the buffers of the whole weight.

        Raises:
            ShardError: another process has reached a different module, or has not reached this one in time.
        """
        gathered = fetched.result()
        if gathered.ready is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(gathered.ready)
            gathered.flat.record_stream(stream)
        found = {}
        for suffix, (start, shape, dtype) in self.layout.items():
            found[suffix] = gathered.flat[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        return found

    def release(self, fetched: Future[_Gathered]) -> None:
        """Give the memory back once the gather has finished.

        This also applies to weights that all processes gathered ahead but do not need.
        """
        fetched.add_done_callback(self.placement.give_back)

    def export(self) -> dict[str, Tensor]:
        device = self.kept.device if isinstance(self.kept, Tensor) else torch.device("cpu")
        with self.lease(device) as buffers:
            return {suffix: buffer.clone() for suffix, buffer in buffers.items()}


def _part(nbytes: int, size: int) -> int:
    """Return the number of bytes in each of ``size`` processes."""
    return -(-nbytes // (size * ALIGNMENT)) * ALIGNMENT


def _bytes(buffer: Tensor) -> Tensor:
    return buffer.detach().contiguous().reshape(-1).view(torch.uint8)
