"""The kernels in plain torch, for every device; the other kernels are tested against them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from arctic_plugins.frozen import take_scratch
from arctic_plugins_fp8.formats import FORMATS

__all__ = [
    "decode",
    "encode",
    "grad_input",
    "grad_input_experts",
    "linear",
    "linear_bf16",
    "linear_experts",
    "linear_fp8",
    "pack",
    "quantize",
    "scaled_product",
    "unpack",
]

BLOCK, GPU_BLOCK = 1 << 19, 1 << 24
"""The number of elements that are encoded or decoded at a time, so that temporaries fit the cache and peak memory stays
close to the size of the result. Each block waits for a GPU, so there a block is larger.
"""


def encode(weight_NK: Tensor, codes: Tensor, scale_NG: Tensor, bits: int, largest: float, candidates: int) -> bool:
    """See :func:`arctic_plugins_fp8.kernels.encode`."""
    in_features = weight_NK.shape[1]
    rows, groups, size = codes.shape
    group = size * 8 // bits
    for block in _blocks(rows, groups * group, codes.device):
        w_nGg = torch.nn.functional.pad(weight_NK[block].float(), (0, groups * group - in_features)).unflatten(
            -1, (groups, group)
        )
        top_nG = w_nGg.abs().amax(-1)
        if not bool((top_nG <= largest).all()):  # also False for NaN
            return False
        scale_nG = torch.where(top_nG == 0, 1.0, top_nG / FORMATS[bits].max).clamp_min(torch.finfo(torch.float32).tiny)
        if candidates > 1:
            scale_nG = torch.where(top_nG == 0, 1.0, _best_scale(w_nGg, scale_nG, bits, candidates))
        codes[block] = pack(quantize(w_nGg * (1.0 / scale_nG)[..., None], bits), bits)
        scale_NG[block] = scale_nG
    return True


def _best_scale(w_nGg: Tensor, scale_nG: Tensor, bits: int, candidates: int) -> Tensor:
    """Return the first of the scales ``scale * (1 + i / candidates)`` with the smallest squared error."""
    values, best, smallest = _table(bits, w_nGg.device), scale_nG, torch.full_like(scale_nG, torch.inf)
    for at in range(candidates):
        factor = 1 + at / candidates
        scaled = w_nGg * (1.0 / (scale_nG * factor))[..., None]
        error = (values[quantize(scaled, bits)] - scaled).square().sum(-1) * (factor * factor)
        best, smallest = torch.where(error < smallest, scale_nG * factor, best), torch.minimum(error, smallest)
    return best


def decode(codes: Tensor, scale_NG: Tensor, bits: int, out_NK: Tensor) -> None:
    """See :func:`arctic_plugins_fp8.kernels.decode`."""
    (rows, groups, size), (_, in_features) = codes.shape, out_NK.shape
    group = size * 8 // bits
    padded = groups * group != in_features
    for block in _blocks(rows, groups * group, codes.device):
        values, factor = _values(codes[block], bits, out_NK.dtype)
        scale_nG1 = (scale_NG[block] * factor)[..., None]
        if padded:
            out_NK[block] = (values * scale_nG1).to(out_NK.dtype).flatten(1)[:, :in_features]
        else:
            torch.mul(values, scale_nG1, out=out_NK[block].view(-1, groups, group))


def linear(x: Tensor, codes: Tensor, scale_NG: Tensor, bits: int) -> Tensor:
    """See :func:`arctic_plugins_fp8.kernels.linear`."""
    return x @ _scratch(x, codes, scale_NG, bits, x.shape[-1]).T


def linear_bf16(x: Tensor, weight_NK: Tensor) -> Tensor:
    """See :func:`arctic_plugins_fp8.kernels.linear_bf16`."""
    return torch.nn.functional.linear(x, weight_NK.to(x.dtype))


def linear_fp8(x: Tensor, codes: Tensor, scale_NG: Tensor) -> Tensor:
    """See :func:`arctic_plugins_fp8.kernels.linear_fp8`."""
    rows_MK = x.reshape(-1, x.shape[-1]).float()
    top_M1 = rows_MK.abs().amax(-1, keepdim=True)
    scale_M1 = torch.where(top_M1 == 0, 1.0, top_M1 / FORMATS[8].max)
    rounded_MK = (rows_MK / scale_M1).clamp(-FORMATS[8].max, FORMATS[8].max).to(torch.float8_e4m3fn)
    if len(rows_MK) and _has_fp8_units(x.device) and all(size % 16 == 0 for size in (x.shape[-1], codes.shape[0])):
        y_MN = scaled_product(rounded_MK, scale_M1, codes, scale_NG)
        return y_MN.to(x.dtype).view(*x.shape[:-1], codes.shape[0])
    return torch.ops.arctic_fp8.linear((rounded_MK.float() * scale_M1).to(x.dtype).view(x.shape), codes, scale_NG, 8)


def scaled_product(x_MK: Tensor, scale_M1: Tensor, codes: Tensor, scale_NG: Tensor) -> Tensor:
    """Return ``(x * scale) @ (codes * scale).T`` of e4m3 numbers, in bfloat16, computed by the library.

    GPUs of compute capability 8.9 or later use FP8 units.
    """
    weight_NK = codes.squeeze(-2).view(torch.float8_e4m3fn)
    return torch._scaled_mm(x_MK, weight_NK.T, scale_a=scale_M1, scale_b=scale_NG.view(1, -1), out_dtype=torch.bfloat16)


def _has_fp8_units(device: torch.device) -> bool:
    """Whether the library multiplies e4m3 with a scale per row there.

    Not on cards of capability 12.0 (pytorch/pytorch#192707), nor on AMD's, whose capabilities mean something else.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and (8, 9) <= torch.cuda.get_device_capability(device) < (12, 0)
    )


def grad_input(grad: Tensor, codes: Tensor, scale_NG: Tensor, bits: int, in_features: int) -> Tensor:
    """See :func:`arctic_plugins_fp8.kernels.grad_input`."""
    return grad @ _scratch(grad, codes, scale_NG, bits, in_features)


def linear_experts(x_MK: Tensor, codes: Tensor, scale_NG: Tensor, bits: int, counts: Tensor) -> Tensor:
    """See :func:`arctic_plugins_fp8.kernels.linear_experts`."""
    y_MN = x_MK.new_zeros(len(x_MK), len(codes) // len(counts))
    for rows, *own in _by_expert(counts, codes, scale_NG):
        y_MN[rows] = torch.ops.arctic_fp8.linear(x_MK[rows], *own, bits)
    return y_MN


def grad_input_experts(
    grad_MN: Tensor, codes: Tensor, scale_NG: Tensor, bits: int, in_features: int, counts: Tensor
) -> Tensor:
    """See :func:`arctic_plugins_fp8.kernels.grad_input_experts`."""
    result_MK = grad_MN.new_zeros(len(grad_MN), in_features)
    for rows, *own in _by_expert(counts, codes, scale_NG):
        result_MK[rows] = torch.ops.arctic_fp8.grad_input(grad_MN[rows], *own, bits, in_features)
    return result_MK


def _by_expert(counts: Tensor, codes: Tensor, scale_NG: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield which rows are its own, the codes and the scales of every expert that has rows."""
    each, first = len(codes) // len(counts), 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            own = slice(expert * each, (expert + 1) * each)
            yield slice(first, first + count), codes[own], scale_NG[own]
            first += count


def _scratch(like: Tensor, codes: Tensor, scale_NG: Tensor, bits: int, in_features: int) -> Tensor:
    shape = (codes.shape[0], in_features)
    weight_NK = take_scratch(shape, like.dtype, like.device)
    weight_NK = like.new_empty(shape) if weight_NK is None else weight_NK
    torch.ops.arctic_fp8.decode(codes, scale_NG, bits, weight_NK)
    return weight_NK


def _blocks(rows: int, row_size: int, device: torch.device) -> Iterator[slice]:
    step = max(1, (BLOCK if device.type == "cpu" else GPU_BLOCK) // row_size)
    return (slice(start, start + step) for start in range(0, rows, step))


def quantize(values: Tensor, bits: int, *, top: int | None = None) -> Tensor:
    """Round float32 to codes (int32), to nearest even, saturating at the code ``top`` (by default the format's)."""
    form, raw = FORMATS[bits], values.view(torch.int32)
    magnitude, shift = raw & 0x7FFFFFFF, 23 - form.mantissa
    normal = ((magnitude + ((1 << (shift - 1)) - 1) + ((magnitude >> shift) & 1)) >> shift) - (
        (127 - form.bias) << form.mantissa
    )
    # Adding a constant whose last mantissa bit is one subnormal step leaves the rounded number of steps in the low bits
    # of the sum.
    offset = torch.tensor((127 + 23 + 1 - form.bias - form.mantissa) << 23, dtype=torch.int32, device=values.device)
    steps = (magnitude.view(torch.float32) + offset.view(torch.float32)).view(torch.int32) - offset
    code = torch.where(magnitude < (127 + 1 - form.bias) << 23, steps, normal).clamp_max(
        form.top if top is None else top
    )
    return code | ((raw >> 31) & 1) << (bits - 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``[..., g]`` into bytes ``[..., g * bits / 8]``, least significant bits first."""
    if bits == 8:
        return codes.to(torch.uint8)
    unit = FORMATS[bits].unit  # the number of codes in three bytes
    shifts = torch.arange(unit, device=codes.device, dtype=torch.int32) * bits
    words = (codes.unflatten(-1, (-1, unit)) << shifts).sum(-1, dtype=torch.int32)
    return torch.stack([words & 0xFF, (words >> 8) & 0xFF, words >> 16], -1).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Reverse :func:`pack`; return int32."""
    if bits == 8:
        return packed.int()
    three = packed.unflatten(-1, (-1, 3)).int()
    words = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
    shifts = torch.arange(FORMATS[bits].unit, device=packed.device, dtype=torch.int32) * bits
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _values(packed: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the values of the codes divided by a factor, exactly, and the factor.

    For 8 bits, moving bits is several times faster than a table: the 7 bits of exponent and mantissa, moved to their
    positions in a bfloat16, give the value divided by 2**120 (the difference of the biases, 127 - 7), including
    subnormals.
    """
    if bits == 8:
        moved = (
            packed.view(torch.int8).to(torch.int16).bitwise_left_shift_(4).bitwise_and_(-0x7810)
        )  # 0x87F0: sign, 4 low exponent, 3 high mantissa bits
        values = moved.view(torch.bfloat16)
        return (values, 2.0**120) if dtype == torch.bfloat16 else (values.float() * 2.0**120, 1.0)
    return _table(bits, packed.device)[unpack(packed, bits)], 1.0


@cache
def _table(bits: int, device: torch.device) -> Tensor:
    return torch.tensor(FORMATS[bits].values(), dtype=torch.float32, device=device)
