"""The codec: how a weight becomes bytes, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from arctic_plugins.errors import CodecError
from arctic_plugins.frozen import Buffers, Codec, TensorSpec
from torch import Tensor

__all__ = ["Acme01CodecCodec"]

LARGEST = 127
"""The largest code; the smallest is its negative."""


@dataclass(frozen=True)
class Acme01CodecCodec(Codec):
    """Symmetric int8 with codes ``int8 [*lead, N, G, group_size]`` and scales ``float32 [*lead, N, G]``.

    G = ceil(K / group_size); the last group is filled up with zeros. A weight is its code times its group's scale.
    """

    type: ClassVar[str] = "acme-0-1-codec"

    group_size: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise CodecError(f"group_size is {self.group_size!r}", expected="a positive number")

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        *rows, columns = shape
        groups = -(-columns // self.group_size)
        return {
            "": TensorSpec((*rows, groups, self.group_size), torch.int8, k_dim=len(rows)),
            "_scale": TensorSpec((*rows, groups), torch.float32, k_dim=len(rows)),
        }

    @property
    def k_border(self) -> int:
        return self.group_size

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        weight = weight.detach().float()
        if not bool(weight.isfinite().all()):
            raise CodecError("the weight contains NaN or infinite values")
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[-1] % self.group_size))
        groups = padded.unflatten(-1, (-1, self.group_size))
        scale = groups.abs().amax(-1) / LARGEST
        codes = (groups / scale.clamp(min=1e-38).unsqueeze(-1)).round().clamp(-LARGEST, LARGEST)
        return {"": codes.to(torch.int8), "_scale": scale}

    def decode(
        self, buffers: Buffers, shape: tuple[int, ...], dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Tensor:
        groups = buffers[""].float() * buffers["_scale"].unsqueeze(-1)
        weight = groups.flatten(-2)[..., : shape[-1]].to(dtype)
        return weight.contiguous() if out is None else out.copy_(weight)
