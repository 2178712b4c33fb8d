"""Weights in files that are mapped read-only: in memory from shortly before they are used until right after."""

from __future__ import annotations

import ctypes
import json
import mmap
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from arctic_plugins.errors import UserError
from arctic_plugins.frozen import Handle, LeaseOrder
from arctic_plugins.frozen.codec import Buffers

__all__ = ["DiskStore", "DiskWeight"]

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14 (include/uapi/asm-generic/mman-common.h): map all pages now, in one call."""


class DiskStore:
    """Writes weights to files in ``directory`` and reads ``ahead`` weights ahead of use, in the order that it saw
    before.

    The files are removed from the directory as soon as they are mapped: the space is given back when the process ends,
    however it ends.
    """

    def __init__(self, directory: Path, ahead: int) -> None:
        self.directory, self.ahead = directory, ahead
        self.order = LeaseOrder()
        self.weights: dict[str, DiskWeight] = {}
        self.lock = threading.Lock()
        self._reader: ThreadPoolExecutor | None = None
        self._fetched: OrderedDict[DiskWeight, Future[None]] = OrderedDict()

    def hold(self, name: str, buffers: Buffers) -> DiskWeight:
        """Write the buffers of a weight, and map them.

        Raises:
            UserError: the file cannot be written.
        """
        path = self.directory / f"{uuid4().hex}.safetensors"  # other processes, of other machines too, may write here
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            save_file({f"weight{suffix}": buffer.detach().contiguous() for suffix, buffer in buffers.items()}, path)
            weight = DiskWeight(self, name, path, buffers)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{name} cannot be written to {path}: {error}",
                fix="free space, or set plugins.offload.path to another disk",
            ) from error
        finally:
            path.unlink(missing_ok=True)
        self.weights[name] = weight
        del buffers
        if hasattr(_libc, "malloc_trim"):
            _libc.malloc_trim(
                0
            )  # what was freed goes back to the system, of which glibc keeps most: half of a model's size in the end
        return weight

    def fetch_upcoming(self) -> None:
        """Start to read what was used next the last time; drop what was read ahead and is not among it. The caller
        holds the lock.
        """
        upcoming = [
            weight for name in self.order.upcoming(self.ahead) if (weight := self.weights.get(name)) is not None
        ]
        for weight in [weight for weight in self._fetched if weight not in upcoming]:
            future = self._fetched.pop(weight)
            future.cancel()
            future.add_done_callback(weight.drop_unused)
        for weight in upcoming:
            if weight not in self._fetched and not weight.leases:
                self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="arctic-offload")
                self._fetched[weight] = self._reader.submit(weight.populate)

    def take(self, weight: DiskWeight) -> Future[None] | None:
        """The reading ahead of ``weight``, if there is one, which is over as far as the store is concerned. The caller
        holds the lock.
        """
        return self._fetched.pop(weight, None)


class DiskWeight(Handle):
    """One weight in a mapped file. Its pages count as memory of the process only while it is leased or read ahead."""

    def __init__(self, store: DiskStore, name: str, path: Path, like: Buffers) -> None:
        self.store, self.name = store, name
        self.leases = 0
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the memory is not writable: nobody writes to it
            whole = torch.frombuffer(mapped, dtype=torch.uint8)
        start = 8 + int.from_bytes(mapped[:8], "little")  # of the data; before it a header in JSON, and its length
        header = json.loads(mapped[8:start])
        self._buffers = {}
        for suffix, buffer in like.items():
            begin, end = header[f"weight{suffix}"]["data_offsets"]
            self._buffers[suffix] = whole[start + begin : start + end].view(buffer.dtype).view(buffer.shape)
        self._range = whole.data_ptr(), len(mapped)

    @contextmanager
    def lease(self, device: torch.device) -> Iterator[Buffers]:
        with self.store.lock:
            fetching = self.store.take(self)
            self.leases += 1
            self.store.order.leased(self.name)
            self.store.fetch_upcoming()
        if fetching is None or fetching.cancel():
            self.populate()
        else:
            fetching.result()
        try:
            if device.type == "cpu":
                yield self._buffers
            else:
                yield {suffix: buffer.to(device) for suffix, buffer in self._buffers.items()}
        finally:
            with self.store.lock:
                self.leases -= 1
            self.drop_unused()

    def export(self) -> dict[str, Tensor]:
        return dict(self._buffers)

    def populate(self) -> None:
        """Bring the file's pages into this process, without holding Python's lock."""
        if _madvise(*self._range, _POPULATE_READ):
            _madvise(*self._range, mmap.MADV_WILLNEED)

    def drop_unused(self, _: object = None) -> None:
        """Take the pages out of this process unless they are leased. The system may keep them as cache, for as long as
        nobody needs the memory.
        """
        if not self.leases:
            _madvise(*self._range, mmap.MADV_DONTNEED)


_libc = ctypes.CDLL(None, use_errno=True)  # mmap.madvise holds Python's lock; foreign functions do not


def _madvise(start: int, length: int, advice: int) -> int:
    result: int = _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))
    return result
