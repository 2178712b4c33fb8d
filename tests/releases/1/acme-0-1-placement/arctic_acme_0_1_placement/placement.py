"""The placement: where the bytes of a weight are while it is not used."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from arctic_plugins.errors import ClaimError
from arctic_plugins.frozen import Buffers, Handle, Placement
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Acme01PlacementPlacement"]


class Acme01PlacementPlacement(Placement):
    """Weights in files, in a new directory within ``directory`` that is removed along with the placement."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = Path(tempfile.mkdtemp(dir=directory))
        self._numbers = itertools.count()
        weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)

    def hold(self, name: str, buffers: Buffers, inner: Placement | None = None) -> Handle:
        if inner is not None:
            raise ClaimError(f"{name}: files leave no bytes for the placement after them", fix="use one of the two")
        path = self.directory / f"{next(self._numbers)}.safetensors"  # a weight that changes gets a new file
        save_file({f"weight{suffix}": buffer.contiguous() for suffix, buffer in buffers.items()}, path)
        return Acme01PlacementHandle(path, self)

    def describe(self) -> str:
        return "files"


class Acme01PlacementHandle(Handle):
    """A weight in the file ``path``. It keeps the placement, and so the file, alive."""

    def __init__(self, path: Path, placement: Acme01PlacementPlacement) -> None:
        self.path, self.placement = path, placement

    @contextmanager
    def lease(self, device: torch.device) -> Iterator[Buffers]:
        yield {suffix: buffer.to(device) for suffix, buffer in self.export().items()}

    def export(self) -> dict[str, Tensor]:
        mapped = load_file(self.path)  # pages are read from the file when they are used
        return {key.removeprefix("weight"): buffer for key, buffer in mapped.items()}
