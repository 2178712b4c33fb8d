"""Weights as 8, 6 or 12-bit floating-point numbers with float32 scales, per output channel or per group along K."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from arctic_plugins.errors import CodecError
from arctic_plugins.frozen import Buffers, Codec, TensorSpec
from arctic_plugins_fp8 import kernels
from arctic_plugins_fp8.formats import FORMATS

__all__ = ["LARGEST_WEIGHT", "FP8Codec"]

LARGEST_WEIGHT = 2.0**7 * FORMATS[8].max
"""The largest magnitude that can be encoded: beyond it, the reference's scale times 2**120 overflows float32
(:func:`arctic_plugins_fp8.kernels.reference._values`).
"""
CANDIDATES = {"max": 1, "mse": 16}
"""The number of scales that are tried for each group."""
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@dataclass(frozen=True)
class FP8Codec(Codec):
    """Codec with ``codes uint8 [*lead, N, G, g * bits / 8]`` and ``scale float32 [*lead, N, G]``, G = ceil(K / g).

    For ``group_size="channel"`` there is one group of size K (rounded up so that codes fill whole bytes: to a multiple
    of 4 for 6 bits, of 2 for 12). A weight is ``value(code) * scale``; encoding rounds ``weight * (1 / scale)``, in
    float32, to nearest even. If g does not divide K, the last group is padded with zeros.

    The scale is the group's largest magnitude divided by the format's largest value
    (:mod:`arctic_plugins_fp8.formats`). For ``scale="mse"`` it is that times one of 1, 1 + 1/16, ..., 1 + 15/16,
    whichever gives the smallest squared error. A factor of two would move every number to another exponent and change
    only the smallest numbers; factors in between align the grid differently with the group's weights.

    For ``activations="fp8"``, each row of :meth:`linear`'s input is rounded to e4m3 with its own scale, and GPUs with
    FP8 units multiply the rounded values; :meth:`grad_input` is the gradient of the unrounded product. If vLLM splits a
    weight along K, each process scales its own part of the row.
    """

    type: ClassVar[str] = "fp8"

    bits: Literal[6, 8, 12] = 8
    group_size: int | Literal["channel"] = "channel"
    scale: Literal["max", "mse"] = "max"
    activations: Literal["full", "fp8"] = "full"

    def __post_init__(self) -> None:
        if self.bits not in FORMATS:
            raise CodecError(f"fp8 has bits={self.bits!r}", expected="6, 8 or 12", fix="correct bits")
        if self.scale not in CANDIDATES:
            raise CodecError(f"fp8 has scale={self.scale!r}", expected="'max' or 'mse'", fix="correct scale")
        if self.activations not in ("full", "fp8") or (
            self.activations == "fp8" and (self.bits, self.group_size) != (8, "channel")
        ):
            raise CodecError(
                f"fp8 has activations={self.activations!r} with bits={self.bits} and group_size={self.group_size!r}",
                expected="'full', or 'fp8' with bits 8 and group_size 'channel'",
                fix="correct one of them",
            )
        if self.group_size != "channel" and not (isinstance(self.group_size, int) and 32 <= self.group_size <= 512):
            raise CodecError(
                f"fp8 has group_size={self.group_size!r}", expected="'channel' or 32 to 512", fix="correct group_size"
            )
        if self.group_size != "channel" and self.group_size % self._unit:
            raise CodecError(
                f"fp8 has group_size={self.group_size} with bits={self.bits}",
                expected=f"a multiple of {self._unit}",
                fix="correct group_size",
            )

    @property
    def _unit(self) -> int:
        return FORMATS[self.bits].unit

    def describe(self) -> str:
        scale = "" if self.scale == "max" else f", scale {self.scale}"
        activations = "" if self.activations == "full" else f", activations {self.activations}"
        return f"fp8 (bits {self.bits}, group_size {self.group_size}{scale}{activations})"

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        *rows, in_features = shape
        if len(shape) < 2 or not all(shape):
            raise CodecError(
                f"a weight of shape {tuple(shape)} cannot be encoded",
                expected="at least two dimensions, none of them 0",
            )
        by_channel = self.group_size == "channel"
        group = -(-in_features // self._unit) * self._unit if by_channel else int(self.group_size)
        groups = -(-in_features // group)
        return {
            "": TensorSpec(
                (*rows, groups, group * self.bits // 8), torch.uint8, k_dim=len(rows) + 1 if by_channel else len(rows)
            ),
            "_scale": TensorSpec((*rows, groups), torch.float32, k_dim=None if by_channel else len(rows)),
        }

    @property
    def k_border(self) -> int:
        return self._unit if self.group_size == "channel" else int(self.group_size)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        weight = weight.detach()
        weight = weight if weight.dtype in DTYPES else weight.float()
        buffers = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=weight.device)
            for name, spec in self.layout(tuple(weight.shape)).items()
        }
        weight_NK = weight.reshape(prod(weight.shape[:-1]), weight.shape[-1]).contiguous()
        if not kernels.encode(weight_NK, *_flat(buffers), self.bits, LARGEST_WEIGHT, CANDIDATES[self.scale]):
            raise CodecError(
                "the weight holds NaN, Inf or a value outside the range of fp8",
                expected=f"finite values of magnitude at most {LARGEST_WEIGHT:.0f}",
                fix="exclude the module from fp8, or repair the weight",
            )
        return buffers

    def decode(
        self, buffers: Buffers, shape: tuple[int, ...], dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Tensor:
        codes, scale = _flat(buffers)
        if dtype not in DTYPES:
            decoded = self.decode(buffers, shape, torch.float32).to(dtype)
            return decoded if out is None else out.copy_(decoded)
        out = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
        kernels.decode(codes, scale, self.bits, out.view(codes.shape[0], shape[-1]))
        return out

    def linear(self, x: Tensor, buffers: Buffers, shape: tuple[int, int]) -> Tensor:
        if x.dtype not in DTYPES:
            return super().linear(x, buffers, shape)
        if self.activations == "fp8":
            return kernels.linear_fp8(x, buffers[""], buffers["_scale"])
        return kernels.linear(x, buffers[""], buffers["_scale"], self.bits)

    def grad_input(self, grad: Tensor, buffers: Buffers, shape: tuple[int, int]) -> Tensor:
        if grad.dtype not in DTYPES:
            return super().grad_input(grad, buffers, shape)
        return kernels.grad_input(grad, buffers[""], buffers["_scale"], self.bits, shape[1])

    def linear_experts(self, x: Tensor, buffers: Buffers, shape: tuple[int, int, int], counts: Tensor) -> Tensor:
        if x.dtype not in DTYPES or self.activations == "fp8":
            return super().linear_experts(x, buffers, shape, counts)
        return kernels.linear_experts(x, *_flat(buffers), self.bits, counts)

    def grad_input_experts(self, grad: Tensor, buffers: Buffers, shape: tuple[int, int, int], counts: Tensor) -> Tensor:
        if grad.dtype not in DTYPES:
            return super().grad_input_experts(grad, buffers, shape, counts)
        return kernels.grad_input_experts(grad, *_flat(buffers), self.bits, shape[2], counts)


def _flat(buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Return contiguous codes ``[rows, G, bytes]`` and scales ``[rows, G]``."""
    return buffers[""].flatten(0, -3).contiguous(), buffers["_scale"].flatten(0, -2).contiguous()
