"""Conversion to and from DeepSpeedFP, the format of DeepSpeed's FP quantizer and Snowflake's quantized checkpoints.

A weight is flattened and split into groups of ``group_size`` (512). Each group consists of ``group_size * bits / 8``
bytes of codes, least significant bits first, and the float32 scale that multiplies them: ``uint8 [numel / group_size,
group_size * bits / 8 + 4]``. The numbers (DeepSpeed's csrc/fp_quantizer/fp_quantize.cu and
deepspeed/ops/fp_quantizer/quantize.py, read in 2026) have 1 + e + m bits with bias ``2**(e-1) - 1``, scaled so that the
largest of a group is 480 (8 bits, e4m3), 28 (6 bits, e3m2) or 510 (12 bits, e7m4). There are no subnormal numbers and
no zero: a code with exponent bits 0 is ``2**-bias * (1 + mantissa)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.errors import CheckpointError, CodecError
from arctic_plugins.frozen import Buffers, Codec, Converter, Exporter
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_fp8.formats import FORMATS
from arctic_plugins_fp8.kernels.reference import pack, quantize, unpack

__all__ = ["DeepSpeedFPConverter", "DeepSpeedFPExporter"]

MANTISSA = {8: 3, 6: 2, 12: 4}
GROUP = 512


def values(bits: int) -> Tensor:
    """Return the value of every DeepSpeedFP code, float32 ``[2**bits]``.

    With 12 bits, values outside the range of float32 are infinite.
    """
    mantissa_bits = MANTISSA[bits]
    exponent_bits = bits - 1 - mantissa_bits
    codes = torch.arange(1 << bits)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    magnitude = torch.exp2((exponent - (1 << (exponent_bits - 1)) + 1).double()) * (
        1 + (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    )
    return torch.where(codes >> (bits - 1) == 1, -magnitude, magnitude).float()


class DeepSpeedFPConverter(Converter):
    """Converter from DeepSpeedFP, configured by ``bits`` and ``group_size``.

    ``config_files`` are the files in which vLLM looked for these keys.

    Groups of the flattened weight become groups of gcd(group_size, K) within rows, which share their scale. Values that
    exist in this project's formats are converted exactly: everything that DeepSpeed writes with 8 and 6 bits, and with
    12 bits magnitudes from 2**-9 to 510 (times the scale). Smaller ones are rounded to a multiple of 2**-13.
    """

    config_files = ("quant_config.json", "quantize_config.json")

    def __init__(self, config: Mapping[str, Any]) -> None:
        bits, group_size = config.get("bits"), config.get("group_size", GROUP)
        if type(bits) is not int or bits not in MANTISSA or type(group_size) is not int or group_size < 1:
            raise CheckpointError(
                f"the checkpoint is quantized with bits {bits!r} and group_size {group_size!r}",
                expected="bits of 8, 6 or 12 in groups",
                fix="correct them",
            )
        self.bits, self.group_size = bits, group_size

    def rows(self, weight: Tensor, in_features: int) -> int:
        return weight.shape[0] * self.group_size // in_features

    def codec(self, shape: tuple[int, ...]) -> FP8Codec:
        group = gcd(self.group_size, shape[-1])
        if prod(shape) % self.group_size or not 32 <= group <= 512 or group % FORMATS[self.bits].unit:
            raise CodecError(
                f"a weight of shape {shape} in groups of {self.group_size} cannot be split into groups within its rows",
                expected="a number of inputs that has a common factor from 32 to 512 with the group size",
                fix="convert from the original weights",
            )
        return FP8Codec(bits=self.bits, group_size=group)  # type: ignore[arg-type]

    def buffers(self, weight: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        codec, flat = self.codec(shape), weight.view(torch.uint8)
        expected = (prod(shape) // self.group_size, self.group_size * self.bits // 8 + 4)
        if tuple(flat.shape) != expected:
            raise CodecError(
                f"a weight of shape {shape} has {tuple(flat.shape)} bytes",
                expected=f"{expected}",
                fix="correct 'bits' and 'group_size'",
            )
        group = int(codec.group_size)
        codes = unpack(flat[:, :-4], self.bits).view(*shape[:-1], -1, group)
        scale = (
            flat[:, -4:]
            .contiguous()
            .view(torch.float32)
            .expand(-1, self.group_size // group)
            .reshape(*shape[:-1], -1)
            .clone()
        )
        if not bool(scale.isfinite().all()):
            raise CodecError(
                "a scale is NaN or infinite", fix="the checkpoint is damaged, or its quantization config is wrong"
            )
        table = quantize(values(self.bits).clamp(-510, 510), self.bits, top=(1 << (self.bits - 1)) - 1)
        return {"": pack(table[codes], self.bits), "_scale": scale}


class DeepSpeedFPExporter(Exporter):
    """Exporter to DeepSpeedFP, from ``group_size: 512`` with K a multiple of 512, and 8 or 6 bits.

    Values that DeepSpeedFP lacks (zero, and magnitudes below ``2**-bias``) become the nearest one that it has.
    """

    def quantization_config(self, codecs: Mapping[str, Codec], plain: Sequence[str]) -> dict[str, Any]:
        found = set(codecs.values())
        for name, codec in codecs.items():
            if not isinstance(codec, FP8Codec) or codec.group_size != GROUP or codec.bits == 12 or len(found) > 1:
                raise CodecError(
                    f"{name} is encoded as {codec}",
                    expected=f"fp8 with bits 8 or 6 and group_size {GROUP}, the same everywhere",
                    fix="quantize with these options",
                )
        return {"quant_method": "deepspeedfp", "bits": next(iter(codecs.values())).bits, "group_size": GROUP}  # type: ignore[attr-defined]

    def tensors(self, codec: Codec, buffers: Buffers, shape: tuple[int, int]) -> dict[str, Tensor]:
        assert isinstance(codec, FP8Codec), "checked in quantization_config"
        if shape[1] % GROUP:
            raise CodecError(
                f"the weight has {shape[1]} inputs",
                expected=f"a multiple of {GROUP}",
                fix="exclude the module from fp8",
            )
        theirs, ours = values(codec.bits), torch.tensor(FORMATS[codec.bits].values())
        nearest = (theirs[None].double() - ours[:, None].double()).abs().argmin(1)
        codes = nearest.int()[unpack(buffers[""].view(-1, GROUP * codec.bits // 8), codec.bits)]
        scale = buffers["_scale"].reshape(-1, 1).contiguous().view(torch.uint8)
        return {"weight": torch.cat([pack(codes, codec.bits), scale], 1)}
