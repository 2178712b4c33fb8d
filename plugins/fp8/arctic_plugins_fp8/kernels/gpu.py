"""Decoding on GPUs, in Triton. Products are the library's, over the decoded weight.

Never ran on a GPU: tested in Triton's interpreter.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arctic_plugins_fp8.formats import FORMATS

__all__ = ["decode"]

BLOCK = 1024


@triton.jit
def _decode(
    codes,
    scale,
    out,
    in_features,
    groups,
    group,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decode one block of one row: ``out[row, k] = value(code) * scale``, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < in_features
    which = k // group
    bit = (k - which * group) * BITS
    group_bytes = group * BITS // 8
    at = codes + (row * groups + which) * group_bytes + bit // 8
    code = tl.load(at, mask=inside, other=0).to(tl.int32)
    if BITS != 8:
        # A code spans at most two bytes. The second may be past the end of the group; it then contains no bit of it.
        more = tl.load(at + 1, mask=inside & (bit // 8 + 1 < group_bytes), other=0).to(tl.int32)
        code = ((code | (more << 8)) >> (bit % 8)) & ((1 << BITS) - 1)
    magnitude = code & ((1 << (BITS - 1)) - 1)
    normal = ((magnitude << (23 - MANTISSA)) + ((127 - BIAS) << 23)).to(tl.float32, bitcast=True)
    step = ((127 + 1 - BIAS - MANTISSA) << 23) + tl.zeros_like(magnitude)  # the unit of subnormal codes
    value = tl.where(magnitude >> MANTISSA == 0, magnitude.to(tl.float32) * step.to(tl.float32, bitcast=True), normal)
    value = tl.where(code >> (BITS - 1) == 1, -value, value) * tl.load(
        scale + row * groups + which, mask=inside, other=0.0
    )
    if out.dtype.element_ty == tl.bfloat16:  # to nearest even, by hand: Triton 3.9's interpreter rounds differently
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        value = value.to(out.dtype.element_ty)
    tl.store(out + row * in_features + k, value, mask=inside)


def decode(codes: Tensor, scale_NG: Tensor, bits: int, out_NK: Tensor) -> None:
    """See :func:`arctic_plugins_fp8.kernels.decode`."""
    (rows, groups, size), in_features, form = codes.shape, out_NK.shape[1], FORMATS[bits]
    grid = (rows, triton.cdiv(in_features, BLOCK))
    with torch.cuda.device_of(out_NK):
        _decode[grid](
            codes.contiguous(),
            scale_NG.contiguous(),
            out_NK,
            in_features,
            groups,
            size * 8 // bits,
            bits,
            form.mantissa,
            form.bias,
            BLOCK,
        )
