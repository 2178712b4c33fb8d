"""Weights in pinned host memory, copied to the device on a stream of their own, ahead of use.

Checked on CPU, where a lease gives the host's own buffers; the copies need a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from arctic_plugins.frozen import Handle, LeaseOrder
from arctic_plugins.frozen.codec import Buffers

__all__ = ["HostStore", "HostWeight"]


@dataclass
class _Copy:
    """Buffers on a device, which are there when ``ready`` has happened on the compute stream."""

    buffers: dict[str, Tensor]
    ready: torch.cuda.Event


class HostStore:
    """Keeps weights in host memory, and copies ``ahead`` of them to the device before they are used, in the order that
    it saw before.
    """

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self.order = LeaseOrder()
        self.weights: dict[str, HostWeight] = {}
        self._copies: dict[HostWeight, _Copy] = {}
        self._stream: torch.cuda.Stream | None = None

    def hold(self, name: str, buffers: Buffers) -> HostWeight:
        """Keep a copy in host memory, pinned where there is a GPU; what is in host memory already and need not be
        pinned is kept as it is.
        """
        pin = torch.cuda.is_available()
        kept = {
            suffix: _pinned(buffer.detach()) if pin else buffer.detach().cpu() for suffix, buffer in buffers.items()
        }
        weight = self.weights[name] = HostWeight(self, name, kept)
        return weight

    def take(self, weight: HostWeight, device: torch.device) -> dict[str, Tensor]:
        """The buffers on a GPU, in the order of the current stream; the copies of what was used next the last time are
        started.
        """
        copy = self._copies.pop(weight, None) or self._copy(weight, device)
        upcoming = [other for name in self.order.upcoming(self.ahead) if (other := self.weights.get(name)) is not None]
        self._copies = {other: self._copies.get(other) or self._copy(other, device) for other in upcoming}
        compute = torch.cuda.current_stream(device)
        compute.wait_event(copy.ready)
        for buffer in copy.buffers.values():
            buffer.record_stream(
                compute
            )  # the allocator must not give it to the copying stream again before this one is done
        return copy.buffers

    def _copy(self, weight: HostWeight, device: torch.device) -> _Copy:
        self._stream = self._stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            buffers = {suffix: buffer.to(device, non_blocking=True) for suffix, buffer in weight.buffers.items()}
            return _Copy(buffers, self._stream.record_event())


class HostWeight(Handle):
    """One weight in host memory."""

    def __init__(self, store: HostStore, name: str, buffers: dict[str, Tensor]) -> None:
        self.store, self.name, self.buffers = store, name, buffers
        self._leased: dict[str, Tensor] | None = None
        self._leases = 0

    @contextmanager
    def lease(self, device: torch.device) -> Iterator[Buffers]:
        if device.type != "cuda":
            yield (
                self.buffers
                if device.type == "cpu"
                else {suffix: buffer.to(device) for suffix, buffer in self.buffers.items()}
            )
            return
        if self._leased is None:
            self.store.order.leased(self.name)
            self._leased = self.store.take(self, device)
        self._leases += 1
        try:
            yield self._leased
        finally:
            self._leases -= 1
            if not self._leases:
                self._leased = None

    def export(self) -> dict[str, Tensor]:
        return dict(self.buffers)


def _pinned(buffer: Tensor) -> Tensor:
    pinned = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
    return pinned.copy_(buffer)
