"""Decoding and products, as operators that compilers leave as they are, and all that is called of bitsandbytes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.frozen import take_scratch

__all__ = [
    "BLOCK",
    "DTYPES",
    "decode_int8",
    "decode_nf4",
    "dynamic_map",
    "linear_int8",
    "linear_nf4",
    "nf4_middles",
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
FEW_ROWS = 8
"""Up to this many rows, torch's product with int8 weights is faster than decoding (docs/fp8.md)."""


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


@cache
def nf4_middles() -> tuple[float, ...]:
    """Return the 15 numbers halfway between neighbors of nf4's 16."""
    numbers = _functional.get_4bit_type("nf4", device="cpu")
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


def decode_nf4(codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, out_NK: Tensor) -> None:
    """Decode into the contiguous ``out_NK``, in float32 and rounded once.

    Args:
        codes: uint8 ``[*lead, N, B, 32]``.
        absmax: ``[*lead, N, B]``, float32, or uint8 if there are ``scale`` and ``offset``, float32 ``[*lead, N, 1]``.
        scale, offset: None if ``absmax`` is float32.
        out_NK: ``[rows, K]`` for all rows of ``lead`` and N, in one of :data:`DTYPES`.
    """
    absmax_NB = _absmax(absmax, scale, offset).flatten(0, -2).contiguous()
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


def _absmax(absmax: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    if scale is None or offset is None:
        return absmax
    return dynamic_map(absmax.device)[absmax.int()] * scale + offset


def decode_int8(codes: Tensor, absmax: Tensor, out_NK: Tensor) -> None:
    """Decode into the contiguous ``out_NK``, in float32 and rounded once.

    Args:
        codes: int8 ``[*lead, N, 1, K]``.
        absmax: float32 ``[*lead, N, 1]``.
        out_NK: ``[rows, K]`` for all rows of ``lead`` and N, in any floating dtype.
    """
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
        absmax_NB = _absmax(absmax, scale, offset)
        product: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x, codes.reshape(-1, 1).contiguous(), shape, absmax_NB.flatten().contiguous(), BLOCK, "nf4"
        )
        return product
    weight = _memory(shape, x)
    decode_nf4(codes, absmax, scale, offset, weight)
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
    decode_nf4(codes, absmax, scale, offset, weight)
    return grad @ weight


def _linear_int8(x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    out_features, _, in_features = codes.shape
    # torch's kernel reads beyond rows whose length is not a multiple of 32 (torch 2.13), and is slow without AVX-512
    if (
        x.dtype == torch.bfloat16
        and 0 < x.numel() <= FEW_ROWS * in_features
        and in_features % 32 == 0
        and x.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    ):
        ones = torch.ones(out_features, dtype=x.dtype)
        sums = torch._weight_int8pack_mm(x.reshape(-1, in_features).contiguous(), codes[:, 0].contiguous(), ones)
        return (sums * (absmax[:, 0] * INT8_STEP)).to(x.dtype).view(*x.shape[:-1], out_features)
    weight = _memory((out_features, in_features), x)
    decode_int8(codes, absmax, weight)
    return torch.nn.functional.linear(x, weight)


def _grad_input_int8(grad: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    weight = _memory((codes.shape[0], codes.shape[-1]), grad)
    decode_int8(codes, absmax, weight)
    return grad @ weight


def _memory(shape: tuple[int, int], like: Tensor) -> Tensor:
    scratch = take_scratch(shape, like.dtype, like.device)
    return torch.empty(shape, dtype=like.dtype, device=like.device) if scratch is None else scratch


_library = torch.library.Library("arctic_bnb", "FRAGMENT")


def _define(suffix: str, schema: str, linear: Callable[..., Tensor], grad_input: Callable[..., Tensor]) -> None:
    """Define ``linear_<suffix>`` and ``grad_input_<suffix>``; the first is differentiable in ``x``."""
    _library.define(f"linear_{suffix}(Tensor x, {schema}) -> Tensor")
    _library.define(f"grad_input_{suffix}(Tensor grad, {schema}) -> Tensor")
    _library.impl(f"linear_{suffix}", linear, "CompositeExplicitAutograd")
    _library.impl(f"grad_input_{suffix}", grad_input, "CompositeExplicitAutograd")

    def fake_linear(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], codes.shape[0]))

    def fake_grad_input(grad: Tensor, codes: Tensor, *rest: Any) -> Tensor:
        return grad.new_empty((*grad.shape[:-1], rest[-1] if suffix == "nf4" else codes.shape[-1]))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
        ctx.weight = inputs[1:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient = getattr(torch.ops.arctic_bnb, f"grad_input_{suffix}")(grad, *ctx.weight)
        return (gradient, *(None for _ in ctx.weight))

    torch.library.register_fake(f"arctic_bnb::linear_{suffix}", fake_linear, lib=_library)
    torch.library.register_fake(f"arctic_bnb::grad_input_{suffix}", fake_grad_input, lib=_library)
    torch.library.register_autograd(f"arctic_bnb::linear_{suffix}", backward, setup_context=keep, lib=_library)


_define(
    "nf4",
    "Tensor codes, Tensor absmax, Tensor? scale, Tensor? offset, int in_features",
    _linear_nf4,
    _grad_input_nf4,
)
_define("int8", "Tensor codes, Tensor absmax", _linear_int8, _grad_input_int8)


def linear_nf4(
    x: Tensor, codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, in_features: int
) -> Tensor:
    """Return the product of ``x [..., K]``, of one of :data:`DTYPES`, and a weight ``[N, K]`` (:func:`decode_nf4`)."""
    product: Tensor = torch.ops.arctic_bnb.linear_nf4(x, codes, absmax, scale, offset, in_features)
    return product


def linear_int8(x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """Return the product of ``x [..., K]`` and a weight ``[N, K]`` (:func:`decode_int8`)."""
    product: Tensor = torch.ops.arctic_bnb.linear_int8(x, codes, absmax)
    return product
