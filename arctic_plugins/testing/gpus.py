"""A stand-in for a GPU's streams and events that finds races: what placements do on a GPU, checked without one."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["TracedGpu"]

POISON = 0xA5


@dataclass(eq=False)
class _Stream:
    """A queue of operations, with a vector clock: which operations of every stream come before its next one."""

    gpu: TracedGpu
    number: int
    clock: dict[int, int] = field(default_factory=dict)
    time: float = 0.0
    """When its last operation ends, in simulated seconds."""
    pending: list[tuple[int, Callable[[], object]]] = field(default_factory=list)

    def wait_event(self, event: _Event) -> None:
        if event.captured != self.gpu.in_graph:
            self.gpu.errors.append("a wait for an event of another graph")
        for number, count in event.clock.items():
            self.clock[number] = max(self.clock.get(number, 0), count)
            self.gpu.finish(number, count)
        self.time = max(self.time, event.time)


@dataclass(eq=False)
class _Event:
    clock: dict[int, int]
    time: float
    timed: bool
    captured: bool

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        assert self.timed, "only timed events have times"
        assert end.timed, "only timed events have times"
        return (end.time - self.time) * 1000


@dataclass
class _Access:
    start: int
    stop: int
    writes: bool
    stream: int
    count: int


class TracedGpu:
    """In place of :class:`arctic_plugins.frozen.Gpu`: memory is the host's, and the order of events is checked.

    Copies run as late as a device might run them, when a stream waits for them; until then their target is poisoned.
    Two accesses of the same bytes, at least one of which writes, must be ordered by events (a vector clock for each
    stream), and memory may be freed only when its last accesses come before what its stream does next. What breaks this
    is in :attr:`errors`. Nothing here can wait for the device. Time is simulated: :meth:`compute` takes as long as
    told, and copies take bytes / ``bandwidth``.

    Args:
        bandwidth: of copies, in bytes per second.
        total: bytes of device memory.
        pins: how many times :meth:`pin` succeeds.
    """

    def __init__(self, bandwidth: float = 1e9, total: int = 1 << 40, pins: float = float("inf")) -> None:
        self.bandwidth, self.total, self.pins = bandwidth, total, pins
        self.errors: list[str] = []
        self.pinned: dict[int, int] = {}
        """Address -> bytes of pinned memory."""
        self.allocated: list[int] = []
        """Bytes of every allocation so far."""
        self.live = 0
        """Bytes that are allocated now."""
        self.peak = 0
        self.in_graph = False
        """Whether the stream of the computation is being captured."""
        self._accesses: list[_Access] = []
        self._streams: list[_Stream] = []
        self._shared: dict[int, list[_Stream]] = {}
        self._local = threading.local()
        self._main = self.new_stream()

    # What arctic_plugins.frozen.Gpu does

    def available(self) -> bool:
        return True

    def serves(self, device: torch.device) -> bool:
        return True

    def new_stream(self, device: torch.device | None = None) -> _Stream:
        stream = _Stream(self, len(self._streams))
        self._streams.append(stream)
        return stream

    def current(self, device: torch.device | None = None) -> _Stream:
        return getattr(self._local, "stream", self._main)

    @contextmanager
    def within(self, stream: _Stream) -> Iterator[None]:
        before, self._local.stream = self.current(), stream
        try:
            yield
        finally:
            self._local.stream = before

    def record(self, stream: _Stream, *, timed: bool = False) -> _Event:
        self._tick(stream)
        return _Event(dict(stream.clock), stream.time, timed, self.in_graph and stream is self._main)

    def capturing(self) -> bool:
        return self.in_graph and self.current() is self._main

    def empty(self, nbytes: int, device: torch.device) -> Tensor:
        import torch

        with torch.inference_mode(False):
            memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        start, home = memory.data_ptr(), self.current()
        self.allocated.append(nbytes)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(memory.untyped_storage(), self._freed, start, nbytes, home)
        return memory

    def share(self, memory: Tensor, stream: _Stream) -> None:
        self._shared.setdefault(memory.data_ptr(), []).append(stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        stream = self.current()
        self._access(stream, target, writes=True)
        stream.time += target.nbytes / self.bandwidth
        if stream is self._main:
            target.copy_(source)
        else:
            target.fill_(POISON)
            stream.pending.append((stream.clock[stream.number], lambda: target.copy_(source)))

    def memory(self, device: torch.device) -> tuple[int, int]:
        return self.total - self.live, self.total

    def pin(self, memory: Tensor) -> str | None:
        if len(self.pinned) >= self.pins:
            return "out of memory (2)"
        self.pinned[memory.data_ptr()] = memory.nbytes
        return None

    def unpin(self, address: int) -> None:
        del self.pinned[address]

    # What tests add

    def compute(self, seconds: float, *buffers: Tensor) -> None:
        """Enqueue a computation in the current stream that reads ``buffers``."""
        stream = self.current()
        for buffer in buffers:
            self._access(stream, buffer, writes=False)
        stream.time += seconds

    @property
    def seconds(self) -> float:
        """When the computation's stream is done, in simulated seconds."""
        return self._main.time

    def finish(self, number: int, count: int) -> None:
        """Run the copies of a stream up to its operation ``count``."""
        pending = self._streams[number].pending
        while pending and pending[0][0] <= count:
            pending.pop(0)[1]()

    def _tick(self, stream: _Stream) -> int:
        stream.clock[stream.number] = stream.clock.get(stream.number, 0) + 1
        return stream.clock[stream.number]

    def _access(self, stream: _Stream, buffer: Tensor, *, writes: bool) -> None:
        start, stop = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        kept = []
        for before in self._accesses:
            overlaps = before.start < stop and start < before.stop
            ordered = stream.clock.get(before.stream, 0) >= before.count
            if overlaps and (writes or before.writes) and not ordered:
                self.errors.append(
                    f"stream {stream.number} {'writes' if writes else 'reads'} what stream {before.stream} "
                    f"{'writes' if before.writes else 'reads'}, and no event orders them"
                )
            if not (writes and ordered and start <= before.start and before.stop <= stop):
                kept.append(before)
        self._accesses = [*kept, _Access(start, stop, writes, stream.number, self._tick(stream))]

    def _freed(self, start: int, nbytes: int, home: _Stream) -> None:
        self.live -= nbytes
        shared = {stream.number for stream in self._shared.pop(start, [])} | {home.number}
        for access in [each for each in self._accesses if start <= each.start < start + nbytes]:
            self._accesses.remove(access)
            if access.stream not in shared and home.clock.get(access.stream, 0) < access.count:
                self.errors.append(f"memory is freed before stream {access.stream} is done with it")
