"""Decoding and products, as operators that compilers leave as they are, and all that is called of bitsandbytes.

These are ``torch.ops.arctic_bnb.{decode, linear, grad_input, linear_experts, grad_input_experts}_{nf4, int8}``. On CPU
they are compiled kernels (``csrc``), if these can be built; everywhere else they are the functions of this module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.frozen import take_scratch
from arctic_plugins.kernels import CompiledKernels

__all__ = [
    "BLOCK",
    "DTYPES",
    "compiled",
    "decode_int8",
    "decode_nf4",
    "dynamic_map",
    "float_absmax",
    "grad_input_experts_int8",
    "grad_input_experts_nf4",
    "grad_input_int8",
    "grad_input_nf4",
    "linear_experts_int8",
    "linear_experts_nf4",
    "linear_int8",
    "linear_nf4",
    "nf4_middles",
    "nf4_numbers",
    "tiles",
]

BLOCK = 64
"""Weights of nf4 that share a scale, as by default in bitsandbytes."""
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
"""What weights are decoded to; bitsandbytes knows no others."""
INT8_STEP = 7.874015718698502e-3
"""1 / 127, as bitsandbytes writes it (``_ops.py``, ``int8_vectorwise_dequant``)."""
TILE = 2**19
"""Weights that are encoded or decoded at a time on CPU, so that what is computed on the way stays in its caches.

On an AMD EPYC (Zen 5), 2**19 to 2**21 decode 3.5 times as fast as 2**15.
"""


def _import_bitsandbytes() -> Any:
    """Import bitsandbytes, without its warning that a kernel from the Hub is missing, which nothing here would call."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, logger.disabled = logger.disabled, True
    try:
        import bitsandbytes.functional
    finally:
        logger.disabled = before
    return bitsandbytes.functional


_functional = _import_bitsandbytes()


def nf4_numbers() -> Tensor:
    """Return nf4's 16 numbers, float32 and sorted, on CPU."""
    numbers: Tensor = _functional.get_4bit_type("nf4", device="cpu")
    return numbers


@cache
def nf4_middles() -> tuple[float, ...]:
    """Return the 15 numbers halfway between neighbors of nf4's 16."""
    numbers = nf4_numbers()
    return tuple(((numbers[:-1] + numbers[1:]) / 2).tolist())


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """Return bitsandbytes' signed dynamic map: 256 sorted numbers from -1 to 1, float32."""
    numbers: Tensor = _functional.create_dynamic_map()
    return numbers.to(device)


def tiles(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of ``rows`` rows: on CPU tiles of about :data:`TILE` weights, elsewhere all of them."""
    size = max(1, TILE // width) if device.type == "cpu" else rows
    return (slice(first, first + size) for first in range(0, rows, size))


def _decode_nf4(codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, out_NK: Tensor) -> None:
    absmax_NB = float_absmax(absmax, scale, offset).flatten(0, -2).contiguous()
    codes_NB = codes.flatten(0, -3).contiguous()
    rows, blocks = absmax_NB.shape
    decode = torch.ops.bitsandbytes.dequantize_4bit
    if codes.is_cuda and out_NK.shape[1] == blocks * BLOCK:
        decode.out(codes_NB, absmax_NB, BLOCK, "nf4", out_NK.shape, out_NK.dtype, out=out_NK)
        return
    for part in tiles(rows, blocks * BLOCK, codes.device):  # bitsandbytes has no `out` on CPU, and fresh memory is slow
        shape = (len(absmax_NB[part]), blocks * BLOCK)
        decoded = decode(codes_NB[part], absmax_NB[part], BLOCK, "nf4", shape, out_NK.dtype)
        out_NK[part].copy_(decoded[:, : out_NK.shape[1]])


def float_absmax(absmax: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """Return the scales of nf4's blocks in float32; see :data:`decode_nf4`."""
    if scale is None or offset is None:
        return absmax
    return dynamic_map(absmax.device)[absmax.int()] * scale + offset


def _decode_int8(codes: Tensor, absmax: Tensor, out_NK: Tensor) -> None:
    codes_NK, absmax_N1, tile = codes.flatten(0, -2), absmax.flatten(0, -2), None
    for part in tiles(codes_NK.shape[0], codes_NK.shape[1], codes.device):
        rows = codes_NK[part]
        if tile is None or len(tile) != len(rows):  # one for all but the last: fresh memory is slow
            tile = torch.empty(rows.shape, dtype=torch.float32, device=codes.device)
        out_NK[part].copy_(tile.copy_(rows).mul_(absmax_N1[part]).mul_(INT8_STEP))


def _linear_nf4(
    x: Tensor, codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, in_features: int
) -> Tensor:
    shape = (codes.shape[0], in_features)
    if _has_fused_nf4(x) and in_features % BLOCK == 0:
        absmax_NB = float_absmax(absmax, scale, offset)
        product: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x, codes.reshape(-1, 1).contiguous(), shape, absmax_NB.flatten().contiguous(), BLOCK, "nf4"
        )
        return product
    weight = _memory(shape, x)
    _decode_nf4(codes, absmax, scale, offset, weight)
    return torch.nn.functional.linear(x, weight)


def _has_fused_nf4(x: Tensor) -> bool:
    """Return whether bitsandbytes has a kernel for rows on this device that reads nf4 as this plugin stores it.

    The one for CUDA does: ``gemm_4bit`` (``backends/cuda/ops.py``) chooses between it and decoding, by the card and
    the number of rows. The one for AVX512_BF16 reads the codes of 32 rows interleaved (``functional.py``,
    ``_convert_weight_packed_for_cpu``), in which rows cannot be found by slicing.
    """
    return x.is_cuda


def _grad_input_nf4(
    grad: Tensor, codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, in_features: int
) -> Tensor:
    weight = _memory((codes.shape[0], in_features), grad)
    _decode_nf4(codes, absmax, scale, offset, weight)
    return grad @ weight


def _linear_int8(x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    weight = _memory((codes.shape[0], codes.shape[-1]), x)
    _decode_int8(codes, absmax, weight)
    return torch.nn.functional.linear(x, weight)


def _grad_input_int8(grad: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    weight = _memory((codes.shape[0], codes.shape[-1]), grad)
    _decode_int8(codes, absmax, weight)
    return grad @ weight


def _memory(shape: tuple[int, int], like: Tensor) -> Tensor:
    scratch = take_scratch(shape, like.dtype, like.device)
    return torch.empty(shape, dtype=like.dtype, device=like.device) if scratch is None else scratch


def _by_expert(product: Callable[..., Tensor], rows: Tensor, width: int, *weight: Any) -> Tensor:
    """Apply ``product`` to every expert's rows; ``weight`` is that of all experts and, last, the counts."""
    *arguments, counts = weight
    result, first = rows.new_zeros(len(rows), width), 0
    each = len(arguments[0]) // len(counts)
    for expert, count in enumerate(counts.tolist()):
        if count:
            own = slice(expert * each, (expert + 1) * each)
            part = [one[own] if isinstance(one, Tensor) else one for one in arguments]
            result[first : first + count] = product(rows[first : first + count], *part)
            first += count
    return result


_library = torch.library.Library("arctic_bnb", "FRAGMENT")


def _define(suffix: str, schema: str, width: Callable[..., int], **reference: Callable[..., Any]) -> None:
    """Define the operators of a format; ``linear`` is differentiable in its rows.

    Args:
        suffix: of the operators' names.
        schema: the weight's arguments.
        width: what returns the number of input features for these arguments.
        reference: ``decode``, ``linear`` and ``grad_input`` in torch.
    """
    linear, grad_input = reference["linear"], reference["grad_input"]

    def linear_experts(x: Tensor, *weight: Any) -> Tensor:
        return _by_expert(linear, x, len(weight[0]) // len(weight[-1]), *weight)

    def grad_input_experts(grad: Tensor, *weight: Any) -> Tensor:
        return _by_expert(grad_input, grad, width(*weight[:-1]), *weight)

    def fake_linear(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], codes.shape[0]))

    def fake_grad_input(grad: Tensor, *weight: Any) -> Tensor:
        return grad.new_empty((*grad.shape[:-1], width(*weight)))

    def fake_linear_experts(x: Tensor, *weight: Any) -> Tensor:
        return x.new_empty((len(x), len(weight[0]) // len(weight[-1])))

    def fake_grad_input_experts(grad: Tensor, *weight: Any) -> Tensor:
        return grad.new_empty((len(grad), width(*weight[:-1])))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
        ctx.weight = inputs[1:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient = getattr(torch.ops.arctic_bnb, f"grad_input_{suffix}")(grad, *ctx.weight)
        return (gradient, *(None for _ in ctx.weight))

    for name, arguments, implementation, fake in (
        ("linear", f"Tensor x, {schema}", linear, fake_linear),
        ("grad_input", f"Tensor grad, {schema}", grad_input, fake_grad_input),
        ("linear_experts", f"Tensor x, {schema}, Tensor counts", linear_experts, fake_linear_experts),
        ("grad_input_experts", f"Tensor grad, {schema}, Tensor counts", grad_input_experts, fake_grad_input_experts),
    ):
        _library.define(f"{name}_{suffix}({arguments}) -> Tensor")
        _library.impl(f"{name}_{suffix}", implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"arctic_bnb::{name}_{suffix}", fake, lib=_library)
    torch.library.register_autograd(f"arctic_bnb::linear_{suffix}", backward, setup_context=keep, lib=_library)

    tensors = schema.removesuffix(", int in_features")  # the shape of the result tells their number
    _library.define(f"decode_{suffix}({tensors}, Tensor(a!) out) -> ()")
    _library.impl(f"decode_{suffix}", reference["decode"], "CompositeExplicitAutograd")
    torch.library.register_fake(f"arctic_bnb::decode_{suffix}", lambda *_: None, lib=_library)
    compiled.implement(
        f"{name}_{suffix}" for name in ("decode", "linear", "grad_input", "linear_experts", "grad_input_experts")
    )


compiled = CompiledKernels(
    "bnb", "ARCTIC_BNB_KERNELS", Path(__file__).parent / "csrc", ("avx512_bf16", "avx512", "avx2", "portable")
)
"""Without ``amx``: the kernels were never run where there are such units, whose many rows the library multiplies."""
_define(
    "nf4",
    "Tensor codes, Tensor absmax, Tensor? scale, Tensor? offset, int in_features",
    lambda *weight: int(weight[4]),
    decode=_decode_nf4,
    linear=_linear_nf4,
    grad_input=_grad_input_nf4,
)
_define(
    "int8",
    "Tensor codes, Tensor absmax",
    lambda codes, *_: int(codes.shape[-1]),
    decode=_decode_int8,
    linear=_linear_int8,
    grad_input=_grad_input_int8,
)

decode_nf4 = torch.ops.arctic_bnb.decode_nf4.default
"""``decode_nf4(codes uint8 [N, B, 32], absmax [N, B], scale, offset, out [N, K])``: decode into the contiguous ``out``,
of one of :data:`DTYPES`, in float32 and rounded once.

``absmax`` is float32, with None for ``scale`` and ``offset``; or uint8, with those float32 ``[N, 1]``.
"""
linear_nf4 = torch.ops.arctic_bnb.linear_nf4.default
"""``linear_nf4(x [..., K], codes, absmax, scale, offset, K) -> [..., N]``: the product with the weight of
:data:`decode_nf4`, accumulated in float32. Differentiable. ``x`` is of one of :data:`DTYPES`.

The weight is rounded to the dtype of ``x`` at most; compiled kernels that multiply in float32 do not round it.
"""
grad_input_nf4 = torch.ops.arctic_bnb.grad_input_nf4.default
"""``grad_input_nf4(grad [..., N], codes, absmax, scale, offset, K) -> [..., K]``: the gradient of
:data:`linear_nf4`."""
linear_experts_nf4 = torch.ops.arctic_bnb.linear_experts_nf4.default
"""``linear_experts_nf4(x [M, K], codes [E * N, B, 32], absmax, scale, offset, K, counts) -> [M, N]``:
:data:`linear_nf4` of each expert's rows with its N rows of the codes.

The rows are sorted by expert; ``counts`` is int64 ``[E]``. Rows after those of the last expert become zero, and experts
without rows are not read. Not differentiable by itself.
"""
grad_input_experts_nf4 = torch.ops.arctic_bnb.grad_input_experts_nf4.default
"""``grad_input_experts_nf4(grad [M, N], codes, absmax, scale, offset, K, counts) -> [M, K]``: the gradient of
:data:`linear_experts_nf4`."""
decode_int8 = torch.ops.arctic_bnb.decode_int8.default
"""``decode_int8(codes int8 [N, 1, K], absmax float32 [N, 1], out [N, K])``: like :data:`decode_nf4`."""
linear_int8 = torch.ops.arctic_bnb.linear_int8.default
"""``linear_int8(x [..., K], codes, absmax) -> [..., N]``: like :data:`linear_nf4`."""
grad_input_int8 = torch.ops.arctic_bnb.grad_input_int8.default
"""``grad_input_int8(grad [..., N], codes, absmax) -> [..., K]``: the gradient of :data:`linear_int8`."""
linear_experts_int8 = torch.ops.arctic_bnb.linear_experts_int8.default
"""``linear_experts_int8(x [M, K], codes [E * N, 1, K], absmax, counts) -> [M, N]``: like :data:`linear_experts_nf4`."""
grad_input_experts_int8 = torch.ops.arctic_bnb.grad_input_experts_int8.default
"""``grad_input_experts_int8(grad [M, N], codes, absmax, counts) -> [M, K]``: the gradient of
:data:`linear_experts_int8`."""
