"""Decoding on GPUs, in Triton, and helpers for launching :mod:`arctic_plugins_fp8.kernels.gpu_kernels`.

Never ran on a GPU: tested in Triton's interpreter.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from arctic_plugins_fp8.formats import FORMATS
from arctic_plugins_fp8.kernels import gpu_kernels

__all__ = ["CHANNEL", "GROUP", "INTERPRETED", "UNITS", "Encoded", "border", "constants", "decode", "on_device_of"]

INTERPRETED = bool(triton.knobs.runtime.interpret)
UNITS = {8: 4, 6: 16, 12: 8}
"""Bits of a code -> number of codes that fill whole 32-bit words."""
CHANNEL, GROUP, EACH = gpu_kernels.CHANNEL.value, gpu_kernels.GROUP.value, gpu_kernels.EACH.value
SMALLEST_BLOCK = 16
"""Smallest block along K that matrix units take."""
DECODED, DECODED_K = 4096, 512
"""Weights that one program decodes, and the most of them in one row."""


class Encoded(NamedTuple):
    """An encoded weight in the form that the kernels take.

    ``row`` is the length of its rows, in words if ``words``, otherwise in bytes.
    """

    codes: Tensor
    scale: Tensor
    rows: int
    row: int
    groups: int
    group: int
    words: bool

    @classmethod
    def of(cls, codes: Tensor, scale_NG: Tensor, bits: int) -> Encoded:
        rows, groups, size = codes.shape
        flat, row = codes.contiguous().view(rows, groups * size), groups * size
        words = row % 4 == 0 and flat.storage_offset() % 4 == 0 and flat.data_ptr() % 4 == 0
        if words:
            flat, row = flat.view(torch.int32), row // 4
        return cls(flat, scale_NG.contiguous(), rows, row, groups, size * 8 // bits, words)


def decode(codes: Tensor, scale_NG: Tensor, bits: int, out_NK: Tensor) -> None:
    """See :func:`arctic_plugins_fp8.kernels.decode`."""
    weight, in_features = Encoded.of(codes, scale_NG, bits), out_NK.shape[1]
    cols, scales = (DECODED_K, CHANNEL) if weight.groups == 1 else border(weight.group, DECODED_K)
    cols = DECODED_K if scales == EACH else cols
    rows = DECODED // cols
    with on_device_of(out_NK):
        gpu_kernels.decode[(-(-weight.rows // rows), -(-in_features // cols))](
            weight.codes,
            weight.scale,
            out_NK,
            weight.rows,
            in_features,
            weight.row,
            weight.groups,
            weight.group,
            **constants(bits, weight.words, scales),
            BLOCK_N=rows,
            BLOCK_K=cols,
        )


def border(group: int, size: int) -> tuple[int, int]:
    """Return the block size along K, at most ``size``, and where scales are applied.

    Blocks lie within a group, unless that would make them too small.
    """
    while size >= SMALLEST_BLOCK and group % size:
        size //= 2
    return (size, GROUP) if size >= SMALLEST_BLOCK else (2 * SMALLEST_BLOCK, EACH)


@cache
def constants(bits: int, words: bool, scales: int) -> dict[str, Any]:
    """Return the compile-time constants that all kernels take."""
    form = FORMATS[bits]
    return {
        "BITS": bits,
        "MANTISSA": form.mantissa,
        "BIAS": form.bias,
        "UNIT": UNITS[bits],
        "WORDS": words,
        "SCALES": scales,
        "INTERPRETED": INTERPRETED,
    }


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of ``tensor`` current, which is where Triton launches."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
