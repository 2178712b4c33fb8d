"""bitsandbytes' nf4 and int8, rearranged so that every row of a weight is encoded on its own.

Formats and arithmetic are those of bitsandbytes 0.50.2 (``functional.py``, ``backends/default/ops.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from arctic_plugins.errors import CodecError
from arctic_plugins.frozen import Buffers, Codec, TensorSpec
from arctic_plugins_bnb import ops
from arctic_plugins_bnb.ops import BLOCK, DTYPES, tiles

__all__ = ["Int8Codec", "NF4Codec"]

LARGEST_WEIGHT = 2.0**100
"""The largest magnitude that can be encoded: 127 times it, and sums of a row's scales, stay in float32's range."""


@dataclass(frozen=True)
class NF4Codec(Codec):
    """Codec with ``codes uint8 [*lead, N, B, 32]`` and scales ``absmax [*lead, N, B]``, B = ceil(K / 64).

    A byte holds two codes, the first one in its upper half. A code is the index of the nearest of 16 numbers, the
    quantiles of a normal distribution (QLoRA, https://arxiv.org/abs/2305.14314); a weight is that number times the
    largest magnitude of its block. Blocks of bitsandbytes run over the flattened weight. If K is a multiple of 64,
    they are the blocks of rows, and codes and scales are those of ``bitsandbytes.functional.quantize_4bit``. For other
    K, this codec pads every row with zeros.

    ``absmax`` is float32. With ``double_quant`` it is uint8, the index into bitsandbytes' dynamic map of 256 numbers,
    and a scale is that number times ``absmax_scale`` plus ``absmax_offset``, both float32 ``[*lead, N, 1]``. The
    offset is the mean of the row's scales. bitsandbytes has one offset for the whole weight and an ``absmax_scale``
    for each 256 blocks of the flattened weight, so that no row could be decoded without others; for a weight with one
    row, of up to 256 blocks, the two are the same.
    """

    type: ClassVar[str] = "bnb-nf4"

    double_quant: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.double_quant, bool):
            raise CodecError(
                f"bnb-nf4 has double_quant={self.double_quant!r}", expected="true or false", fix="correct double_quant"
            )

    def describe(self) -> str:
        return "bnb nf4 (double_quant)" if self.double_quant else "bnb nf4"

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        _check_shape(shape)
        *rows, in_features = shape
        blocks = -(-in_features // BLOCK)
        codes = TensorSpec((*rows, blocks, BLOCK // 2), torch.uint8, k_dim=len(rows))
        if not self.double_quant:
            return {"": codes, "_absmax": TensorSpec((*rows, blocks), torch.float32, k_dim=len(rows))}
        of_row = TensorSpec((*rows, 1), torch.float32)
        return {
            "": codes,
            "_absmax": TensorSpec((*rows, blocks), torch.uint8, k_dim=len(rows)),
            "_absmax_scale": of_row,
            "_absmax_offset": of_row,
        }

    @property
    def k_border(self) -> int:
        return BLOCK

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        weight_NK = _checked_rows(weight)
        layout = self.layout(tuple(weight.shape))
        codes = torch.empty(layout[""].shape, dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(layout["_absmax"].shape, dtype=torch.float32, device=weight.device)
        blocks = absmax.shape[-1]
        codes_NB, absmax_NB = codes.view(-1, blocks, BLOCK // 2), absmax.view(-1, blocks)
        padding = blocks * BLOCK - weight_NK.shape[1]
        for rows in tiles(weight_NK.shape[0], blocks * BLOCK, weight.device):
            part = torch.nn.functional.pad(weight_NK[rows].float(), (0, padding)).view(-1, blocks, BLOCK)
            torch.amax(part.abs(), -1, out=absmax_NB[rows])
            part = (part * (1.0 / absmax_NB[rows].clamp(min=1e-38)).unsqueeze(-1)).clamp_(-1, 1)
            found = _index(part, ops.nf4_middles())
            codes_NB[rows] = found[..., ::2] << 4 | found[..., 1::2]
        if not self.double_quant:
            return {"": codes, "_absmax": absmax}
        offset = absmax.mean(-1, keepdim=True)
        absmax -= offset
        scale = absmax.abs().amax(-1, keepdim=True)
        scaled = (absmax * (1.0 / scale.clamp(min=1e-38))).clamp_(-1, 1)
        numbers = ops.dynamic_map(weight.device)
        found = torch.bucketize(scaled, (numbers[:-1] + numbers[1:]) / 2).to(torch.uint8)
        return {"": codes, "_absmax": found, "_absmax_scale": scale, "_absmax_offset": offset}

    def decode(
        self, buffers: Buffers, shape: tuple[int, ...], dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Tensor:
        if dtype not in DTYPES:
            decoded = self.decode(buffers, shape, torch.float32).to(dtype)
            return decoded if out is None else out.copy_(decoded)
        out = torch.empty(shape, dtype=dtype, device=buffers[""].device) if out is None else out
        ops.decode_nf4(*_rows(buffers), out.view(-1, shape[-1]))
        return out

    def linear(self, x: Tensor, buffers: Buffers, shape: tuple[int, int]) -> Tensor:
        if x.dtype not in DTYPES:
            return super().linear(x, buffers, shape)
        return ops.linear_nf4(x, *_rows(buffers), shape[1])

    def grad_input(self, grad: Tensor, buffers: Buffers, shape: tuple[int, int]) -> Tensor:
        if grad.dtype not in DTYPES:
            return super().grad_input(grad, buffers, shape)
        return ops.grad_input_nf4(grad, *_rows(buffers), shape[1])

    def linear_experts(self, x: Tensor, buffers: Buffers, shape: tuple[int, int, int], counts: Tensor) -> Tensor:
        if x.dtype not in DTYPES:
            return super().linear_experts(x, buffers, shape, counts)
        return ops.linear_experts_nf4(x, *_rows(buffers), shape[2], counts)

    def grad_input_experts(self, grad: Tensor, buffers: Buffers, shape: tuple[int, int, int], counts: Tensor) -> Tensor:
        if grad.dtype not in DTYPES:
            return super().grad_input_experts(grad, buffers, shape, counts)
        return ops.grad_input_experts_nf4(grad, *_rows(buffers), shape[2], counts)


@dataclass(frozen=True)
class Int8Codec(Codec):
    """Codec with ``codes int8 [*lead, N, 1, K]`` and ``absmax float32 [*lead, N, 1]``, the row's largest magnitude.

    A weight is ``code * absmax / 127``, and a code is the nearest integer (ties to even): the vector-wise weights of
    LLM.int8() (https://arxiv.org/abs/2208.07339), as ``bitsandbytes.functional.int8_vectorwise_quant`` computes them
    with ``threshold=0``. bitsandbytes rounds weights to float16 before; this codec does not.

    Inputs are not rounded, and therefore no outliers are kept apart: products are more accurate than those of
    ``bitsandbytes.nn.Linear8bitLt``, and on GPUs slower.
    """

    type: ClassVar[str] = "bnb-int8"

    def describe(self) -> str:
        return "bnb int8"

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        _check_shape(shape)
        *rows, in_features = shape
        return {
            "": TensorSpec((*rows, 1, in_features), torch.int8, k_dim=len(rows) + 1),
            "_absmax": TensorSpec((*rows, 1), torch.float32),
        }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        weight_NK = _checked_rows(weight)
        layout = self.layout(tuple(weight.shape))
        codes = torch.empty(layout[""].shape, dtype=torch.int8, device=weight.device)
        absmax = torch.empty(layout["_absmax"].shape, dtype=torch.float32, device=weight.device)
        codes_NK, absmax_N1 = codes.view(weight_NK.shape), absmax.view(-1, 1)
        for rows in tiles(weight_NK.shape[0], weight_NK.shape[1], weight.device):
            part = weight_NK[rows].float()
            torch.amax(part.abs(), -1, keepdim=True, out=absmax_N1[rows])
            inverse = 127.0 / absmax_N1[rows].clamp(min=1e-36)  # bitsandbytes divides by 0 for a row of zeros
            codes_NK[rows] = (part * inverse).round_().to(torch.int8)
        return {"": codes, "_absmax": absmax}

    def decode(
        self, buffers: Buffers, shape: tuple[int, ...], dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Tensor:
        if dtype not in DTYPES:
            decoded = self.decode(buffers, shape, torch.float32).to(dtype)
            return decoded if out is None else out.copy_(decoded)
        out = torch.empty(shape, dtype=dtype, device=buffers[""].device) if out is None else out
        ops.decode_int8(*_int8_rows(buffers), out.view(-1, shape[-1]))
        return out

    def linear(self, x: Tensor, buffers: Buffers, shape: tuple[int, int]) -> Tensor:
        if x.dtype not in DTYPES:
            return super().linear(x, buffers, shape)
        return ops.linear_int8(x, *_int8_rows(buffers))

    def grad_input(self, grad: Tensor, buffers: Buffers, shape: tuple[int, int]) -> Tensor:
        if grad.dtype not in DTYPES:
            return super().grad_input(grad, buffers, shape)
        return ops.grad_input_int8(grad, *_int8_rows(buffers))

    def linear_experts(self, x: Tensor, buffers: Buffers, shape: tuple[int, int, int], counts: Tensor) -> Tensor:
        if x.dtype not in DTYPES:
            return super().linear_experts(x, buffers, shape, counts)
        return ops.linear_experts_int8(x, *_int8_rows(buffers), counts)

    def grad_input_experts(self, grad: Tensor, buffers: Buffers, shape: tuple[int, int, int], counts: Tensor) -> Tensor:
        if grad.dtype not in DTYPES:
            return super().grad_input_experts(grad, buffers, shape, counts)
        return ops.grad_input_experts_int8(grad, *_int8_rows(buffers), counts)


def _rows(buffers: Buffers) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return nf4's codes ``[rows, B, 32]``, ``absmax``, ``absmax_scale`` and ``absmax_offset``."""
    scale, offset = buffers.get("_absmax_scale"), buffers.get("_absmax_offset")
    return (
        buffers[""].flatten(0, -3),
        buffers["_absmax"].flatten(0, -2),
        None if scale is None else scale.flatten(0, -2),
        None if offset is None else offset.flatten(0, -2),
    )


def _int8_rows(buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Return int8's codes ``[rows, 1, K]`` and ``absmax [rows, 1]``."""
    return buffers[""].flatten(0, -3), buffers["_absmax"].flatten(0, -2)


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) < 2 or not all(shape):
        raise CodecError(
            f"a weight of shape {tuple(shape)} cannot be encoded",
            expected="at least two dimensions, none of them 0",
        )


def _checked_rows(weight: Tensor) -> Tensor:
    """Return ``weight`` as ``[rows, K]``.

    Raises:
        CodecError: the shape has no rows, or a value is NaN, infinite or larger than :data:`LARGEST_WEIGHT`.
    """
    _check_shape(tuple(weight.shape))
    weight_NK = weight.detach().reshape(-1, weight.shape[-1])
    if not bool((torch.stack(weight_NK.aminmax()).float().abs() <= LARGEST_WEIGHT).all()):
        raise CodecError(
            "the weight holds NaN, Inf or a value outside the range of bnb",
            expected=f"finite values of magnitude at most {LARGEST_WEIGHT:.1e}",
            fix="exclude the module from bnb, or repair the weight",
        )
    return weight_NK


def _index(values: Tensor, middles: tuple[float, ...]) -> Tensor:
    """Return how many of the sorted ``middles`` are below each value, uint8.

    The same as ``torch.bucketize``, which bitsandbytes calls, but four times as fast on an AMD EPYC (Zen 5).
    """
    index = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    above = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    for middle in middles:
        torch.gt(values, middle, out=above)
        index += above.view(torch.uint8)
    return index
