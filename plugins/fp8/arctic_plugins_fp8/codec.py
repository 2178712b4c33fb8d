"""FP8 (e4m3) weights with float32 scales per output channel or per group of K. Reference kernels in torch.

e4m3 is the OCP 8-bit floating point format (Micikevicius et al., "FP8 Formats for Deep Learning", 2022): 1 sign, 4 exponent and 3 mantissa
bits, bias 7, no infinity, largest value 448.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from arctic_plugins.errors import CodecError
from arctic_plugins.frozen import Codec, TensorSpec
from arctic_plugins.frozen.codec import Buffers

__all__ = ["FP8Codec"]

E4M3_MAX = 448.0
LARGEST_WEIGHT = 2.0**7 * E4M3_MAX
"""Beyond this, the scale times 2**120 leaves float32 (see :func:`_factor`)."""
BLOCK = 1 << 19
"""Elements that are encoded or decoded at a time: temporaries stay in the cache and peak memory near the result's."""


@dataclass(frozen=True)
class FP8Codec(Codec):
    """``codes uint8 [*lead, N, G, g]`` and ``scale float32 [*lead, N, G]``, where G = ceil(K / g); ``g = K`` for ``"channel"``.

    A weight is ``e4m3(code) * scale``; the scale is the group's largest magnitude / 448, rounding is to nearest even. When g does not divide K the
    last group is padded with zeros.
    """

    type: ClassVar[str] = "fp8"

    bits: Literal[8] = 8
    group_size: int | Literal["channel"] = "channel"

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise CodecError(f"fp8 has bits={self.bits!r}", expected="8", fix="upgrade arctic-plugins-fp8")
        if self.group_size != "channel" and not (isinstance(self.group_size, int) and 32 <= self.group_size <= 512):
            raise CodecError(f"fp8 has group_size={self.group_size!r}", expected="'channel' or 32 to 512", fix="correct group_size")

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        *rows, in_features = shape
        if len(shape) < 2 or not all(shape):
            raise CodecError(f"a weight of shape {tuple(shape)} cannot be encoded", expected="at least two dimensions, none of them 0")
        group = in_features if self.group_size == "channel" else self.group_size
        groups = -(-in_features // group)
        by_channel = self.group_size == "channel"
        return {
            "": TensorSpec((*rows, groups, group), torch.uint8, k_dim=len(rows) + 1 if by_channel else len(rows)),
            "_scale": TensorSpec((*rows, groups), torch.float32, k_dim=None if by_channel else len(rows)),
        }

    @property
    def k_border(self) -> int:
        return 1 if self.group_size == "channel" else self.group_size

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        *rows, in_features = weight.shape
        specs = self.layout(tuple(weight.shape))
        codes, scale = (torch.empty(spec.shape, dtype=spec.dtype, device=weight.device) for spec in specs.values())
        _, groups, group = codes.flatten(0, -3).shape
        w_RK, codes_RGg, scale_RG = weight.detach().reshape(prod(rows), in_features), codes.flatten(0, -3), scale.flatten(0, -2)
        for block in _blocks(len(w_RK), groups * group):
            w_rGg = torch.nn.functional.pad(w_RK[block].float(), (0, groups * group - in_features)).unflatten(-1, (groups, group))
            largest_rG = w_rGg.abs().amax(-1)
            if not bool((largest_rG <= LARGEST_WEIGHT).all()):  # false for NaN too
                raise CodecError(
                    "the weight holds NaN, Inf or a value beyond the range of fp8",
                    expected=f"finite values of magnitude at most {LARGEST_WEIGHT:.0f}",
                    fix="exclude the module from fp8, or repair the weight",
                )
            scale_rG = torch.where(largest_rG == 0, 1.0, largest_rG / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
            codes_RGg[block] = (w_rGg / scale_rG[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
            scale_RG[block] = scale_rG
        return {"": codes, "_scale": scale}

    def decode(self, buffers: Buffers, shape: tuple[int, ...], dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        codes_RGg, scale_RG = buffers[""].flatten(0, -3), buffers["_scale"].flatten(0, -2)
        rows, groups, group = codes_RGg.shape
        if torch.compiler.is_compiling():
            return (_values(codes_RGg, dtype) * _factor(scale_RG, dtype)).to(dtype).flatten(1)[:, : shape[-1]].reshape(shape)
        out = torch.empty(shape, dtype=dtype, device=codes_RGg.device) if out is None else out
        padded = groups * group != shape[-1]
        out_RGg = torch.empty((rows, groups, group), dtype=dtype, device=out.device) if padded else out.view(rows, groups, group)
        factor_RG = _factor(scale_RG, dtype)
        for block in _blocks(rows, groups * group):
            torch.mul(_values(codes_RGg[block], dtype), factor_RG[block], out=out_RGg[block])
        if padded:
            out.view(rows, shape[-1]).copy_(out_RGg.flatten(1)[:, : shape[-1]])
        return out


def _blocks(rows: int, row_size: int) -> Iterator[slice]:
    step = max(1, BLOCK // row_size)
    return (slice(start, start + step) for start in range(0, rows, step))


def _values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """What the codes stand for, times :func:`_factor`'s constant, exactly.

    For bfloat16 the bits do the work, which is several times faster than torch's conversion: moving the 7 bits of exponent and mantissa into their
    places of a bfloat16 gives the value divided by 2**120 (the difference of the biases, 127 - 7), subnormals included.
    """
    if dtype == torch.bfloat16:
        bits = codes.view(torch.int8).to(torch.int16)
        return bits.bitwise_left_shift_(4).bitwise_and_(-0x7810).view(torch.bfloat16)  # 0x87F0: sign, 4 low exponent bits, 3 high mantissa bits
    return codes.view(torch.float8_e4m3fn).float()


def _factor(scale_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """What to multiply :func:`_values` with, in float32; the product is rounded once."""
    return (scale_RG * 2.0**120 if dtype == torch.bfloat16 else scale_RG)[..., None]
