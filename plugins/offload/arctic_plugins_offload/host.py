"""Weights in pinned host memory, copied to the device on a separate stream, ahead of use.

Tested on CPU, where a lease returns the host's own buffers; the copies need a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.frozen import Buffers, FetchedHandle, Prefetch

__all__ = ["HostStore", "HostWeight"]


@dataclass
class _Copy:
    """Buffers on a device, which may be used once the compute stream has waited for ``ready``."""

    buffers: dict[str, Tensor]
    ready: torch.cuda.Event


class HostStore:
    """Store that keeps weights in host memory, and copies ``ahead`` of them to the device ahead of use.

    It copies them in the order in which they were used before.
    """

    def __init__(self, ahead: int) -> None:
        self.prefetch = Prefetch(ahead)
        self._stream: torch.cuda.Stream | None = None

    def hold(self, name: str, buffers: Buffers) -> HostWeight:
        """Keep a copy in host memory, pinned if there is a GPU.

        Without a GPU, buffers that are already in host memory are kept without a copy.
        """
        pin = torch.cuda.is_available()
        kept = {
            suffix: _pinned(buffer.detach()) if pin else buffer.detach().cpu() for suffix, buffer in buffers.items()
        }
        weight = HostWeight(self, name, kept)
        self.prefetch.add(weight)
        return weight

    def copy(self, weight: HostWeight, device: torch.device) -> _Copy:
        """Start to copy ``weight`` to a GPU."""
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            buffers = {suffix: buffer.to(device, non_blocking=True) for suffix, buffer in weight.kept.items()}
            return _Copy(buffers, self._stream.record_event())


class HostWeight(FetchedHandle[_Copy | None]):
    """A weight in host memory."""

    def __init__(self, store: HostStore, name: str, kept: dict[str, Tensor]) -> None:
        super().__init__(name, store.prefetch)
        self.store, self.kept = store, kept

    def fetch(self, device: torch.device, at: FetchedHandle[Any]) -> _Copy | None:
        """Start the copy, or return None if the device is not a GPU, where nothing is copied ahead."""
        return self.store.copy(self, device) if device.type == "cuda" else None

    def buffers(self, fetched: _Copy | None, device: torch.device) -> Buffers:
        """Return the buffers on ``device``; on a GPU, ordered with respect to the current stream."""
        if fetched is None:
            if device.type == "cpu":
                return self.kept
            return {suffix: buffer.to(device) for suffix, buffer in self.kept.items()}
        compute = torch.cuda.current_stream(device)
        compute.wait_event(fetched.ready)
        for buffer in fetched.buffers.values():
            # The allocator must not reuse it on the copy stream before the compute stream is done with it.
            buffer.record_stream(compute)
        return fetched.buffers

    def export(self) -> dict[str, Tensor]:
        return dict(self.kept)


def _pinned(buffer: Tensor) -> Tensor:
    pinned = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
    return pinned.copy_(buffer)
