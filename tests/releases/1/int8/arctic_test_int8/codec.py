"""Symmetric int8 with one scale per output channel, and a placement that keeps bytes in files."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file

from arctic_plugins.errors import ClaimError, CodecError
from arctic_plugins.frozen import Codec, Handle, Placement, TensorSpec


@dataclass(frozen=True)
class Int8Codec(Codec):
    type: ClassVar[str] = "test-int8"

    def layout(self, shape):
        *rows, k = shape
        return {
            "": TensorSpec((*rows, 1, k), torch.int8, k_dim=len(rows) + 1),
            "_step": TensorSpec((*rows, 1), torch.float32),
        }

    def encode(self, weight):
        weight = weight.detach().float()
        largest = weight.abs().amax(-1, keepdim=True)
        if not bool(largest.isfinite().all()):
            raise CodecError("NaN or Inf in the weight")
        step = torch.where(largest == 0, 1.0, largest / 127)
        return {"": (weight / step).round().to(torch.int8).unsqueeze(-2), "_step": step}

    def decode(self, buffers, shape, dtype, *, out=None):
        weight = (buffers[""].squeeze(-2).float() * buffers["_step"]).to(dtype)
        return weight if out is None else out.copy_(weight)


class SpooledWeight(Handle):
    def __init__(self, path):
        self.path = path

    @contextmanager
    def lease(self, device):
        yield self.export()  # mapped, not read

    def export(self):
        return {key.removeprefix("weight"): buffer for key, buffer in load_file(self.path).items()}


class Spool(Placement):
    def __init__(self, directory):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def hold(self, name, buffers, inner=None):
        if inner is not None:
            raise ClaimError("a spool leaves no bytes for the placement after it")
        path = (
            self.directory / f"{name}.{len(list(self.directory.iterdir()))}.safetensors"
        )  # a merged weight gets a file of its own
        save_file({f"weight{suffix}": buffer for suffix, buffer in buffers.items()}, path)
        return SpooledWeight(path)
