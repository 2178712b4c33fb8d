"""Device memory that a second stream fills ahead of a computation, without waiting for the device.

Placements that fetch bytes to a GPU (from host memory, from other processes) use it. The operations of the GPU itself
are in one small class, :class:`Gpu`, so that the order of events can be checked without one
(:class:`arctic_plugins.testing.TracedGpu`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Gpu", "Staged", "Staging", "slot_sizes"]

ALIGNMENT = 256
"""Slots begin at multiples of this many bytes. Vectorized loads need 16."""


class Gpu:
    """The operations of CUDA that :class:`Staging` and placements need. None of them waits for the device.

    Streams and events are torch's own. **Never run on a GPU** in this form.
    """

    def available(self) -> bool:
        """Return whether this machine has a GPU."""
        return torch.cuda.is_available()

    def serves(self, device: torch.device) -> bool:
        """Return whether bytes have to be moved to ``device``."""
        return device.type == "cuda"

    def new_stream(self, device: torch.device) -> Any:
        """Return a new stream of ``device``."""
        return torch.cuda.Stream(device)

    def current(self, device: torch.device) -> Any:
        """Return the stream of the computation in this thread."""
        return torch.cuda.current_stream(device)

    def within(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which ``stream`` is the current one."""
        return torch.cuda.stream(stream)

    def record(self, stream: Any, *, timed: bool = False) -> Any:
        """Return an event after everything that is in ``stream`` so far; two timed ones have an ``elapsed_time``."""
        event = torch.cuda.Event(enable_timing=timed)
        event.record(stream)
        return event

    def capturing(self) -> bool:
        """Return whether the current stream is being captured into a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()

    def empty(self, nbytes: int, device: torch.device) -> Tensor:
        """Return ``[nbytes]``, uint8, of torch's allocator; it belongs to the current stream."""
        with torch.inference_mode(False):  # an inference tensor could not be written to while training
            return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def share(self, memory: Tensor, stream: Any) -> None:
        """Make the allocator, once ``memory`` is freed, wait for what ``stream`` does with it."""
        memory.record_stream(stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy in the current stream. From host memory, it overlaps with others only if that is pinned."""
        target.copy_(source, non_blocking=True)

    def memory(self, device: torch.device) -> tuple[int, int]:
        """Return the bytes that are free, and those that the device has."""
        return torch.cuda.mem_get_info(device)

    def pin(self, memory: Tensor) -> str | None:
        """Page-lock ordinary host ``memory``; return an error if that fails.

        torch's own pinned memory (``pin_memory``) would take the next power of two, up to twice as much.
        """
        runtime, portable = torch.cuda.cudart(), 1  # cudaHostRegisterPortable: for every device of this process
        error = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, portable)
        if int(error) == 0:
            return None
        with suppress(RuntimeError):  # CUDA reports the failed call again at the next launch, which is this one
            torch.ones((), device="cuda")
        return f"{runtime.cudaGetErrorString(error)} ({int(error)})"

    def unpin(self, address: int) -> None:
        """Undo :meth:`pin`, once no copy reads the memory any more: the only operation here that waits."""
        with suppress(RuntimeError):  # the interpreter may be shutting down, after CUDA
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(address)


@dataclass(eq=False)
class _Slot:
    memory: Tensor
    ring: Tensor
    """The memory that it is part of."""
    free: list[Any] = field(default_factory=list)
    """Events after the last uses; the next fill has to wait for them."""
    released: int = 0
    """When it was released last, as a count of releases."""


@dataclass(eq=False)
class Staged:
    """Bytes on the device that the side stream fills."""

    staging: Staging
    """The ring that the bytes belong to."""
    memory: Tensor
    """``[nbytes]``, uint8; to be used only through :meth:`Staging.use`."""
    fill: Callable[[Tensor], None]
    """Writes the bytes to memory, in the current stream."""
    ready: Any
    """Event after the fill; None if it is in the stream of the computation."""
    home: Any
    """The stream in which memory outside the ring was allocated."""
    slot: _Slot | None = None
    """Where the bytes are in the ring; None if they are outside."""
    started: Any = None
    """Timed event before the fill, if asked for."""
    users: list[Any] = field(default_factory=list)
    """Streams that use the memory."""


class Staging:
    """A ring of device memory, allocated once, that a side stream fills while the computation's stream reads from it.

    The ring has ``ahead + 1`` slots: for what is used now and what is fetched ahead. Slot k is as large as the k-th
    largest of any ``ahead + 1`` consecutive ``sizes``, so every such group fits. A slot is filled again once the side
    stream has waited for events that were recorded in the streams that used it, when they were done with it; the host
    waits for nothing. What finds no free slot (more is used at once than the ring was made for) gets memory of torch's
    allocator if it is needed now; otherwise it is not fetched ahead.

    In a CUDA graph that is being captured, bytes are fetched in the captured stream itself, into memory of the graph,
    at every replay and without overlap; nothing is fetched ahead, and the ring is not used. Their source must live as
    long as the graph.

    Args:
        gpu: the operations of the device.
        device: where the ring is.
        sizes: bytes of what will be fetched, in the order of use or one like it.
        ahead: how many are fetched ahead of use.
    """

    def __init__(self, gpu: Gpu, device: torch.device, sizes: Sequence[int], ahead: int) -> None:
        self.gpu, self.device = gpu, device
        self.stream = gpu.new_stream(device)
        self._lock = threading.Lock()
        self._slots: list[int] = []
        self._free: list[_Slot] = []
        self._releases = 0
        self.ring: Tensor | None = None
        """All slots together, ``[bytes]``; None until something is fetched."""
        self._home: Any = None
        self.resize(sizes, ahead)

    @staticmethod
    def nbytes(sizes: Sequence[int], ahead: int) -> int:
        """Return the bytes of the ring for these arguments."""
        return sum(slot_sizes(sizes, ahead + 1))

    def resize(self, sizes: Sequence[int], ahead: int) -> None:
        """Use a new ring, allocated at the next fetch.

        What is in the old one stays valid until it is released; then its memory is freed.
        """
        with self._lock:
            for slot in self._free:
                for event in slot.free:
                    self._home.wait_event(event)  # the allocator hands the memory to this stream next
            self._slots, self._free, self.ring = slot_sizes(sizes, ahead + 1), [], None

    def _allocate(self) -> None:
        self.ring, self._home = self.gpu.empty(sum(self._slots), self.device), self.gpu.current(self.device)
        self.gpu.share(self.ring, self.stream)
        allocated = self.gpu.record(self._home)
        self._free = [_Slot(memory, self.ring, [allocated]) for memory in self.ring.split(self._slots)]

    def fetch(
        self,
        nbytes: int,
        fill: Callable[[Tensor], None],
        *,
        now: bool,
        after: Any = None,
        timed: bool = False,
    ) -> Staged | None:
        """Start to fetch ``nbytes``.

        Args:
            nbytes: how many.
            fill: called once, with ``[nbytes]`` on the device, to enqueue writes in the current stream.
            now: whether they are needed now; if not, and no slot is free, None is returned.
            after: an event that the fill must wait for.
            timed: whether to record when the fill starts and ends.
        """
        current = self.gpu.current(self.device)
        if self.gpu.capturing():
            if not now:
                return None
            memory = self.gpu.empty(nbytes, self.device)
            fill(memory)
            return Staged(self, memory, fill, None, current)
        slot = self._take(nbytes)
        if slot is None and not now:
            return None
        if slot is not None:
            memory, before, home = slot.memory[:nbytes], slot.free, self._home
        else:
            memory, home = self.gpu.empty(nbytes, self.device), current
            before = [self.gpu.record(current)]  # the allocator may hand out memory that this stream still uses
        for event in [*before, *([] if after is None else [after])]:
            self.stream.wait_event(event)
        with self.gpu.within(self.stream):
            started = self.gpu.record(self.stream, timed=True) if timed else None
            fill(memory)
        return Staged(self, memory, fill, self.gpu.record(self.stream, timed=timed), home, slot, started)

    def use(self, staged: Staged) -> Tensor:
        """Return the bytes, for use in the current stream, which waits for them."""
        if staged.ready is None:
            return staged.memory
        if self.gpu.capturing():  # fetched before: a captured stream cannot wait for what is outside the graph
            memory = self.gpu.empty(len(staged.memory), self.device)
            staged.fill(memory)
            return memory
        current = self.gpu.current(self.device)
        current.wait_event(staged.ready)
        if current not in staged.users:
            staged.users.append(current)
        return staged.memory

    def release(self, staged: Staged) -> None:
        """Let go of the bytes: nothing that is enqueued from now on uses them."""
        if staged.ready is None:
            return
        done = [self.gpu.record(stream) for stream in staged.users]
        with self._lock:
            if (slot := staged.slot) is not None and slot.ring is self.ring:
                slot.free = done  # the side stream itself is in order
                self._releases += 1
                slot.released = self._releases
                self._free.append(slot)
                return
        for event in done or [staged.ready]:
            staged.home.wait_event(event)  # the allocator hands the memory to this stream next

    def _take(self, nbytes: int) -> _Slot | None:
        """Return the smallest free slot that is large enough; of equal ones, the one that was released first."""
        with self._lock:
            if self.ring is None:
                self._allocate()
            fitting = [slot for slot in self._free if len(slot.memory) >= nbytes]
            if not fitting:
                return None
            slot = min(fitting, key=lambda slot: (len(slot.memory), slot.released))
            self._free.remove(slot)
            return slot


def slot_sizes(sizes: Sequence[int], count: int) -> list[int]:
    """Return the bytes of at most ``count`` slots, from large to small, that hold any ``count`` consecutive ``sizes``.

    The order is taken to repeat. Sizes are rounded up to :data:`ALIGNMENT`.
    """
    rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    count = min(count, len(rounded))
    groups = [sorted((rounded + rounded)[at : at + count], reverse=True) for at in range(len(rounded))]
    return [max(slot) for slot in zip(*groups, strict=True)]
