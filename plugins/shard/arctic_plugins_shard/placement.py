"""Encoded bytes that are spread over processes.

They are split without regard to their meaning, so any codec, shape and number of processes works.
"""

from __future__ import annotations

import atexit
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from queue import SimpleQueue
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor

from arctic_plugins import world_size
from arctic_plugins.errors import ArcticError, ConfigError
from arctic_plugins.frozen import Buffers, FetchedHandle, Gpu, Handle, Placement, Prefetch, Staged, Staging
from arctic_plugins_shard.config import ShardConfig

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13

__all__ = ["ShardError", "ShardPlacement", "ShardedWeight"]

ALIGNMENT = 16
"""Buffers and parts are padded to multiples of this many bytes, so that they are aligned for any dtype."""


class ShardError(ArcticError):
    """The processes of a run have reached different modules."""


@dataclass(eq=False)
class _Gather:
    """A weight on its way to this process."""

    agreed: Future[Tensor | None]
    """Done once all processes have asked for it; on CPU with all parts, concatenated."""
    staged: Staged | None = None
    """All parts, concatenated, on a GPU."""


class ShardPlacement(Placement):
    """Placement that keeps a part of every weight in this process, and gathers all parts when the weight is leased.

    Every gather is accompanied by a gather of two numbers over gloo, for the weight itself and for the weight that is
    being computed with. Processes that have reached different modules therefore detect it instead of waiting for each
    other. The weights that were leased next the last time are gathered ahead.

    On CPU, one thread issues all collectives, in the order of leases, because gloo's block.

    On GPUs, NCCL's do not block the host, and the thread that leases issues them itself, into a ring of device memory
    (:class:`arctic_plugins.frozen.Staging`). DDP's and those of other plugins are issued by the same thread. The
    collectives of all NCCL communicators are therefore launched in the same order in every process, which NCCL requires
    ("Using multiple NCCL communicators concurrently" in its manual); launched by a thread of their own, gathers and
    DDP's reductions could each wait for the other in different processes. Only the numbers are exchanged in a thread.
    The lease waits for them, not for the device: for other hosts, if they are behind, and for one message that was sent
    when the gather was issued, ``prefetch`` leases earlier. A process that finds a difference does not use the weight.
    **Never run on a GPU.**
    """

    collective = True

    def __init__(self, options: ShardConfig, gpu: Gpu | None = None) -> None:
        self.options = options
        self.prefetch = Prefetch(options.prefetch)
        self.rank, self.size = 0, 1
        self._numbers: dict[int, str] = {}
        self._control: dist.ProcessGroup | None = None
        self._data: dist.ProcessGroup | None = None
        self._work: SimpleQueue[_Task | None] = SimpleQueue()
        self._worker: threading.Thread | None = None
        self._spare: dict[tuple[int, torch.device], list[Tensor]] = defaultdict(list)
        self._lock = threading.Lock()  # guards the spare memory
        self._gpu = Gpu() if gpu is None else gpu
        self._staging: dict[torch.device, Staging] = {}
        self._sizes: dict[str, int] = {}

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
        weight = ShardedWeight(self, name, layout, kept, length)
        self.prefetch.add(weight)
        self._sizes[name] = length * self.size
        self._numbers[weight.number] = name
        return weight

    def describe(self) -> str:
        return f"1/{self.size} in each process"

    def gather(self, weight: ShardedWeight, device: torch.device, at: ShardedWeight) -> _Gather | None:
        """Start to gather the parts of ``weight``, after the gathers that were started before; ``at`` is leased now.

        Return None if there is no room to do so ahead of use, which is the case in all processes or in none.
        """
        agreed: Future[Tensor | None] = Future()
        task = (agreed, weight, device, at)
        if not self._gpu.serves(device):
            self._issue(task)
            return _Gather(agreed)
        staged = self._start(weight, device, task, now=at is weight)
        return None if staged is None else _Gather(agreed, staged)

    def _issue(self, task: _Task) -> None:
        if self._worker is None:
            # A daemon thread: a failed process must be able to exit although its gather never finishes.
            self._worker = threading.Thread(target=self._run, name="arctic-shard", daemon=True)
            self._worker.start()
            atexit.register(self._stop)
        self._work.put(task)

    @torch.no_grad()
    def _start(self, weight: ShardedWeight, device: torch.device, task: _Task, *, now: bool) -> Staged | None:
        """Issue the gather of a weight on a GPU, in this thread."""
        staging = self._staging.get(device)
        if staging is None:
            sizes = list(self._sizes.values())
            staging = self._staging[device] = Staging(self._gpu, device, sizes, self.prefetch.ahead)

        def fill(flat: Tensor) -> None:
            self._issue(task)
            try:
                with weight.part(device) as part:
                    all_gather(flat, part, group=self._data)
            except RuntimeError:
                task[0].result()  # if the processes are at different modules, this is why
                raise

        # The first time, the part may still be on its way from the loader, in the stream of the computation.
        after = None if weight.gathered else self._gpu.record(self._gpu.current(device))
        staged = staging.fetch(weight.length * self.size, fill, now=now, after=after)
        weight.gathered |= staged is not None
        return staged

    def give_back(self, gather: _Gather) -> None:
        """Keep the memory for the next weight of the same size: on CPU, new memory costs page faults."""
        if gather.staged is not None:
            gather.staged.staging.release(gather.staged)
        else:
            gather.agreed.add_done_callback(self._keep)

    def _keep(self, done: Future[Tensor | None]) -> None:
        if done.cancelled() or done.exception() is not None or (flat := done.result()) is None:
            return
        with self._lock:
            self._spare[flat.numel(), flat.device].append(flat)

    def _run(self) -> None:
        while (task := self._work.get()) is not None:
            future, weight, device, at = task
            try:
                self._agree(weight, at)
                future.set_result(None if self._gpu.serves(device) else self._collect(weight, device))
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
    def _collect(self, weight: ShardedWeight, device: torch.device) -> Tensor:
        with weight.part(device) as part:
            with self._lock:
                spare = self._spare[part.numel() * self.size, device]
                flat = spare.pop() if spare else torch.empty(part.numel() * self.size, dtype=torch.uint8, device=device)
            all_gather(flat, part, group=self._data)
        return flat

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


class ShardedWeight(FetchedHandle[_Gather | None]):
    """A weight of which this process holds a part."""

    collective = True

    def __init__(
        self,
        placement: ShardPlacement,
        name: str,
        layout: dict[str, tuple[int, torch.Size, torch.dtype]],
        kept: Tensor | Handle,
        length: int,
    ) -> None:
        super().__init__(name, placement.prefetch)
        self.placement, self.layout, self.kept = placement, layout, kept
        self.length = length
        """Bytes of this process's part."""
        self.gathered = False
        """Whether a gather on a GPU was issued before."""
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

    def fetch(self, device: torch.device, at: FetchedHandle[Any]) -> _Gather | None:
        return self.placement.gather(self, device, cast(ShardedWeight, at))

    def buffers(self, fetched: _Gather | None, device: torch.device) -> Buffers:
        """Return the buffers of the whole weight.

        Raises:
            ShardError: another process has reached a different module, or has not reached this one in time.
        """
        assert fetched is not None  # it was fetched now, or earlier
        flat = fetched.agreed.result()
        if fetched.staged is not None:
            flat = fetched.staged.staging.use(fetched.staged)
        assert flat is not None
        found = {}
        for suffix, (start, shape, dtype) in self.layout.items():
            found[suffix] = flat[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        return found

    def release(self, fetched: _Gather | None) -> None:
        """Give the memory back once the gather has finished.

        This also applies to weights that all processes gathered ahead but do not need.
        """
        assert fetched is not None
        self.placement.give_back(fetched)

    def export(self) -> dict[str, Tensor]:
        device = self.kept.device if isinstance(self.kept, Tensor) else torch.device("cpu")
        with self.lease(device) as buffers:
            return {suffix: buffer.clone() for suffix, buffer in buffers.items()}


_Task: TypeAlias = tuple[Future[Tensor | None], ShardedWeight, torch.device, ShardedWeight]
"""What is done once all processes agree, the weight to gather, where, and the weight that is leased."""


def _part(nbytes: int, size: int) -> int:
    """Return the number of bytes in each of ``size`` processes."""
    return -(-nbytes // (size * ALIGNMENT)) * ALIGNMENT


def _bytes(buffer: Tensor) -> Tensor:
    return buffer.detach().contiguous().reshape(-1).view(torch.uint8)
