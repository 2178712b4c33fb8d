"""Weights in read-only mapped files, which are in memory only from shortly before they are used until right after."""

from __future__ import annotations

import ctypes
import json
import mmap
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from arctic_plugins.errors import UserError
from arctic_plugins.frozen import Buffers, FetchedHandle, Prefetch

__all__ = ["DiskStore", "DiskWeight"]

_POPULATE_READ = 22
"""``MADV_POPULATE_READ`` of Linux 5.14 (include/uapi/asm-generic/mman-common.h): map all pages now, in one call."""


class DiskStore:
    """Store that writes weights to files in ``directory``, and reads ``ahead`` weights ahead of use.

    It reads them in the order in which they were used before. The files are removed from the directory as soon as they
    are mapped, so the space is freed when the process ends, however it ends.
    """

    def __init__(self, directory: Path, ahead: int) -> None:
        self.directory, self.prefetch = directory, Prefetch(ahead)
        self._reader: ThreadPoolExecutor | None = None

    def hold(self, name: str, buffers: Buffers) -> DiskWeight:
        """Write the buffers of a weight to a file and map it.

        Raises:
            UserError: the file cannot be written.
        """
        path = self.directory / f"{uuid4().hex}.safetensors"  # other processes and machines may write here
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
        self.prefetch.add(weight)
        del buffers
        if hasattr(_libc, "malloc_trim"):
            _libc.malloc_trim(
                0
            )  # returns freed memory to the system; otherwise glibc keeps most of it, in the end half of a model's size
        return weight

    def read_ahead(self, weight: DiskWeight) -> Future[None]:
        """Start to read ``weight``, after the reads that were started before."""
        self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="arctic-offload")
        return self._reader.submit(weight.populate)


class DiskWeight(FetchedHandle[Future[None] | None]):
    """A weight in a mapped file. Its pages are in the memory of the process only while it is leased or read ahead."""

    def __init__(self, store: DiskStore, name: str, path: Path, like: Buffers) -> None:
        super().__init__(name, store.prefetch)
        self.store = store
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the memory is not writable; nothing writes to it
            whole = torch.frombuffer(mapped, dtype=torch.uint8)
        start = 8 + int.from_bytes(mapped[:8], "little")  # of the data, after the header's length and its JSON
        header = json.loads(mapped[8:start])
        self._buffers = {}
        for suffix, buffer in like.items():
            begin, end = header[f"weight{suffix}"]["data_offsets"]
            self._buffers[suffix] = whole[start + begin : start + end].view(buffer.dtype).view(buffer.shape)
        self._range = whole.data_ptr(), len(mapped)

    def fetch(self, device: torch.device, at: FetchedHandle[Any]) -> Future[None] | None:
        """Start reading ahead, or return None if the weight is needed now: then :meth:`buffers` reads it."""
        return None if at is self else self.store.read_ahead(self)

    def buffers(self, fetched: Future[None] | None, device: torch.device) -> Buffers:
        if fetched is None or fetched.cancel():
            self.populate()
        else:
            fetched.result()
        if device.type == "cpu":
            return self._buffers
        return {suffix: buffer.to(device) for suffix, buffer in self._buffers.items()}

    def release(self, fetched: Future[None] | None) -> None:
        self.drop_unused()

    def drop(self, fetched: Future[None] | None) -> None:
        if fetched is not None:
            fetched.cancel()
            fetched.add_done_callback(self.drop_unused)

    def export(self) -> dict[str, Tensor]:
        return dict(self._buffers)

    def populate(self) -> None:
        """Map the file's pages into this process, without holding the GIL."""
        if _madvise(*self._range, _POPULATE_READ):
            _madvise(*self._range, mmap.MADV_WILLNEED)

    def drop_unused(self, _: object = None) -> None:
        """Unmap the pages from this process unless they are leased.

        The system may keep them in its cache as long as the memory is not needed.
        """
        if not self.leases:
            _madvise(*self._range, mmap.MADV_DONTNEED)


_libc = ctypes.CDLL(None, use_errno=True)  # mmap.madvise holds the GIL; foreign functions do not


def _madvise(start: int, length: int, advice: int) -> int:
    result: int = _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))
    return result
