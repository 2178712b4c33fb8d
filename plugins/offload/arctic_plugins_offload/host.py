"""Weights in page-locked host memory, copied to the device on a second stream, ahead of use.

The order of copies, events and reused memory is checked on CPU with a stand-in for the GPU
(:class:`arctic_plugins.testing.TracedGpu`). **Never run on a GPU** in this form; an earlier one ran on an H200.
"""

from __future__ import annotations

import logging
import mmap
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.frozen import Buffers, FetchedHandle, Gpu, Prefetch, Staged, Staging
from arctic_plugins_offload.ahead import Pace

__all__ = ["HostStore", "HostWeight"]

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Buffers of a weight begin at multiples of this many bytes."""
START = 2
"""Weights ahead of use with ``prefetch: auto``, until it has measured."""
SHARE = 16
"""The ring of ``prefetch: auto`` takes at most this fraction of the device's memory."""


class HostStore:
    """Store that keeps weights in host memory, and copies ``ahead`` of them to the device ahead of use.

    It copies them in the order in which they were used before, into a ring of device memory
    (:class:`arctic_plugins.frozen.Staging`). Nothing waits for the device in a step.

    Host memory: each weight has pages of its own, ordinary ones that are registered with CUDA. They are freed when no
    tensor views them any more; nothing is rounded up to a power of two, as torch's pinned memory is, and there is no
    second copy. If the driver refuses to register more, one warning says so, and copies from the rest are slower.

    Args:
        ahead: how many, or None to choose by measurement (:class:`~arctic_plugins_offload.ahead.Pace`): the smallest
            depth that keeps the copies from being waited for longer than they must be, with a ring of at most a 16th of
            the device's memory and of half of what is free.
        gpu: the operations of the device.
    """

    def __init__(self, ahead: int | None, gpu: Gpu | None = None) -> None:
        self.gpu = gpu or Gpu()
        self.prefetch = Prefetch(START if ahead is None else ahead)
        self.staging: dict[torch.device, Staging] = {}
        self.sizes: dict[str, int] = {}
        """Name -> bytes in host memory, in the order in which the weights arrived."""
        self._measures = ahead is None
        self._pace: Pace | None = None
        self._pins = True
        self._pinned = 0

    def hold(self, name: str, buffers: Buffers) -> HostWeight:
        """Keep a copy in host memory, page-locked if there is a GPU.

        Without a GPU, buffers that are already in host memory are kept without a copy.
        """
        if not self.gpu.available():
            weight = HostWeight(self, name, {suffix: buffer.detach().cpu() for suffix, buffer in buffers.items()}, None)
        else:
            places, total = {}, 0
            for suffix, buffer in buffers.items():
                places[suffix] = (total, buffer.shape, buffer.dtype)
                total += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
            whole = self._allocate(name, total)
            weight = HostWeight(self, name, _views(whole, places), whole)
            weight.places = places
            for suffix, kept in weight.kept.items():
                kept.copy_(buffers[suffix].detach())
            self.sizes[name] = total
        self.prefetch.add(weight)
        return weight

    def fetch(self, weight: HostWeight, device: torch.device, *, now: bool) -> Staged | None:
        """Start to copy ``weight`` to a GPU, or return None if there is no room to do so ahead of use."""
        whole = weight.whole
        assert whole is not None
        staging = self.staging.get(device)
        if staging is None:
            staging = self.staging[device] = Staging(self.gpu, device, list(self.sizes.values()), self.prefetch.ahead)
            if self._measures and self._pace is None:
                self._pace = Pace(self.gpu, len(self.sizes))
        timed = self._pace is not None and self._pace.timed
        return staging.fetch(len(whole), lambda memory: self.gpu.copy(memory, whole), now=now, timed=timed)

    def use(self, weight: HostWeight, staged: Staged) -> Tensor:
        """Return the bytes on the device, ordered with respect to the current stream."""
        with self.prefetch.lock:
            if self._pace is None or staged.users:  # a lease within a lease is not measured
                return staged.staging.use(staged)
            memory = self._pace.use(weight.name, staged)
            if self._pace.is_over():
                self._adapt(self._pace, staged.staging)
        return memory

    def _adapt(self, pace: Pace, staging: Staging) -> None:
        """Change the depth to what was measured to be enough."""
        self._pace = None
        free, total = self.gpu.memory(staging.device)
        ring = 0 if staging.ring is None else len(staging.ring)
        sizes, ahead = pace.decide(min(total // SHARE, ring + free // 2))
        if ahead != self.prefetch.ahead:
            logger.info("offload: %d weights are copied ahead of use", ahead)
            self.prefetch.ahead = ahead
            for each in self.staging.values():
                each.resize(sizes, ahead)

    def _allocate(self, name: str, nbytes: int) -> Tensor:
        """Return page-aligned memory, registered if possible."""
        pages = _Pages(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]
        if self._pins and nbytes:
            error = self.gpu.pin(memory)
            if error is None:
                # Linux would give forked processes, such as workers that load data, their own copy of locked pages.
                pages.madvise(mmap.MADV_DONTFORK)
                pages.unpin, self._pinned = _unpinning(self.gpu, memory.data_ptr()), self._pinned + nbytes
            else:
                self._pins = False
                logger.warning(
                    "offload: %s cannot be page-locked after %.1f GB (%s); it and the weights after it are copied to "
                    "the device more slowly, and not beside computations: offload less, or allow more locked memory",
                    name,
                    self._pinned / 1e9,
                    error,
                )
        return memory


class HostWeight(FetchedHandle[Staged | None]):
    """A weight in host memory.

    Args:
        store: the store.
        name: the parameter's dotted name.
        kept: its buffers in host memory.
        whole: all of them in one piece, if there is a GPU.
    """

    def __init__(self, store: HostStore, name: str, kept: dict[str, Tensor], whole: Tensor | None) -> None:
        super().__init__(name, store.prefetch)
        self.store, self.kept, self.whole = store, kept, whole
        self.places: dict[str, tuple[int, torch.Size, torch.dtype]] = {}

    def fetch(self, device: torch.device, at: FetchedHandle[Any]) -> Staged | None:
        """Start the copy, or return None if the device is not a GPU, where nothing is copied ahead."""
        if self.whole is None or not self.store.gpu.serves(device):
            return None
        return self.store.fetch(self, device, now=at is self)

    def buffers(self, fetched: Staged | None, device: torch.device) -> Buffers:
        """Return the buffers on ``device``; on a GPU, ordered with respect to the current stream."""
        if fetched is None:
            if device.type == "cpu":
                return self.kept
            return {suffix: buffer.to(device) for suffix, buffer in self.kept.items()}
        return _views(self.store.use(self, fetched), self.places)

    def release(self, fetched: Staged | None) -> None:
        if fetched is not None:
            fetched.staging.release(fetched)

    def export(self) -> dict[str, Tensor]:
        return dict(self.kept)


class _Pages(mmap.mmap):
    """Memory of the system, registered with CUDA for as long as anything views it."""

    unpin: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.unpin is not None and not sys.is_finalizing():  # then CUDA may be gone, and the memory soon is
            self.unpin()


def _unpinning(gpu: Gpu, address: int) -> Callable[[], None]:
    return lambda: gpu.unpin(address)


def _views(memory: Tensor, places: dict[str, tuple[int, torch.Size, torch.dtype]]) -> dict[str, Tensor]:
    return {
        suffix: memory[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for suffix, (start, shape, dtype) in places.items()
    }
