"""Products over encoded weights, in Triton: the host's side of :mod:`arctic_plugins_fp8.kernels.gpu_kernels`.

Never ran on a GPU: tested in Triton's interpreter. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from arctic_plugins_fp8.kernels import gpu_kernels, reference
from arctic_plugins_fp8.kernels.gpu import (
    CHANNEL,
    GROUP,
    INTERPRETED,
    UNITS,
    Encoded,
    border,
    constants,
    on_device_of,
)
from arctic_plugins_fp8.kernels.gpu_blocks import EXACT_LIBRARY_ROWS, Block, RowBlock, card, choose, choose_row

__all__ = ["fused_grad_input", "fused_linear", "grad_input", "grad_input_experts", "linear", "linear_experts"]

BLOCK = 1024
"""Results that one program of ``add_parts`` writes."""


def linear(x: Tensor, codes: Tensor, scale_NG: Tensor, bits: int) -> Tensor:
    """See :func:`arctic_plugins_fp8.kernels.linear`."""
    if _rows(x) >= _library_rows(x):
        return reference.linear(x, codes, scale_NG, bits)
    return fused_linear(x, codes, scale_NG, bits)


def grad_input(grad: Tensor, codes: Tensor, scale_NG: Tensor, bits: int, in_features: int) -> Tensor:
    """See :func:`arctic_plugins_fp8.kernels.grad_input`."""
    if _rows(grad) >= _library_rows(grad):
        return reference.grad_input(grad, codes, scale_NG, bits, in_features)
    return fused_grad_input(grad, codes, scale_NG, bits, in_features)


def linear_experts(x_MK: Tensor, codes: Tensor, scale_NG: Tensor, bits: int, counts: Tensor) -> Tensor:
    """See :func:`arctic_plugins_fp8.kernels.linear_experts`."""
    _check(x_MK, codes, counts)
    weight, width = Encoded.of(codes, scale_NG, bits), len(codes) // len(counts)
    y_MN = x_MK.new_empty(len(x_MK), width)
    if y_MN.numel():
        block = _expert_block(x_MK, bits, width, x_MK.shape[1], len(counts))
        tiles = _tiles(counts, len(x_MK), block.m)
        _multiply(_even(x_MK), weight, y_MN, bits, width, x_MK.shape[1], block, tiles)
    return y_MN


def grad_input_experts(
    grad_MN: Tensor, codes: Tensor, scale_NG: Tensor, bits: int, in_features: int, counts: Tensor
) -> Tensor:
    """See :func:`arctic_plugins_fp8.kernels.grad_input_experts`."""
    _check(grad_MN, codes, counts)
    weight, width = Encoded.of(codes, scale_NG, bits), len(codes) // len(counts)
    result_MK = grad_MN.new_empty(len(grad_MN), in_features)
    if result_MK.numel():
        block = _expert_block(grad_MN, bits, in_features, width, len(counts))
        tiles = _tiles(counts, len(grad_MN), block.m)
        _multiply_gradient(_even(grad_MN), weight, result_MK, bits, width, in_features, block, tiles)
    return result_MK


def fused_linear(
    x: Tensor, codes: Tensor, scale_NG: Tensor, bits: int, *, block: Block | RowBlock | None = None
) -> Tensor:
    """Compute :func:`linear`, decoding in registers for any number of rows.

    ``block`` overrides the block sizes of the table, for measurements.
    """
    weight, in_features = Encoded.of(codes, scale_NG, bits), x.shape[-1]
    y = x.new_empty(*x.shape[:-1], weight.rows)
    if not y.numel():
        return y
    x_MK = _even(x.reshape(-1, in_features))
    on = card(x.device)
    if block is None and len(x_MK) == 1 and _fits_row(weight, bits):
        block = choose_row(on, weight.rows, in_features, bits, UNITS[bits])
    if isinstance(block, RowBlock):
        _multiply_row(x_MK, weight, y, bits, block)
    else:
        block = block or choose(on, x.dtype, bits, len(x_MK), weight.rows, in_features)
        _multiply(x_MK, weight, y, bits, weight.rows, in_features, block, None)
    return y


def fused_grad_input(
    grad: Tensor, codes: Tensor, scale_NG: Tensor, bits: int, in_features: int, *, block: Block | None = None
) -> Tensor:
    """Compute :func:`grad_input` in the same way."""
    weight = Encoded.of(codes, scale_NG, bits)
    result = grad.new_empty(*grad.shape[:-1], in_features)
    if result.numel():
        grad_MN = _even(grad.reshape(-1, weight.rows))
        block = block or choose(card(grad.device), grad.dtype, bits, len(grad_MN), in_features, weight.rows)
        _multiply_gradient(grad_MN, weight, result, bits, weight.rows, in_features, block, None)
    return result


def _multiply_row(x_1K: Tensor, weight: Encoded, y: Tensor, bits: int, block: RowBlock) -> None:
    with on_device_of(y):
        gpu_kernels.multiply_row[(-(-weight.rows // block.n),)](
            x_1K,
            weight.codes,
            weight.scale,
            y,
            weight.rows,
            x_1K.shape[1],
            weight.row,
            weight.groups,
            weight.group,
            **constants(bits, weight.words, CHANNEL if weight.groups == 1 else GROUP),
            BLOCK_N=block.n,
            BLOCK_UNITS=block.units,
            num_warps=block.warps,
        )


def _multiply(
    x_MK: Tensor,
    weight: Encoded,
    y: Tensor,
    bits: int,
    width: int,
    in_features: int,
    block: Block,
    tiles: Tensor | None,
) -> None:
    depth, scales = (block.k, CHANNEL) if weight.groups == 1 else border(weight.group, block.k)
    _launch(gpu_kernels.multiply, x_MK, weight, y, width, in_features, bits, scales, block, tiles, (block.n, depth))


def _multiply_gradient(
    grad_MN: Tensor,
    weight: Encoded,
    result: Tensor,
    bits: int,
    width: int,
    in_features: int,
    block: Block,
    tiles: Tensor | None,
) -> None:
    # The block's k is how deep its sums go, which here is along N.
    cols, scales = (block.n, CHANNEL) if weight.groups == 1 else border(weight.group, block.n)
    kernel = gpu_kernels.multiply_gradient
    _launch(kernel, grad_MN, weight, result, width, in_features, bits, scales, block, tiles, (block.k, cols))


def _launch(
    kernel: Any,
    x: Tensor,
    weight: Encoded,
    out: Tensor,
    width: int,
    in_features: int,
    bits: int,
    scales: int,
    block: Block,
    tiles: Tensor | None,
    sizes: tuple[int, int],
) -> None:
    """Run ``kernel`` with blocks of ``sizes`` along N and K, and add the partial sums if the sums are split."""
    rows = len(x)
    across = -(-width // sizes[0]) if kernel is gpu_kernels.multiply else -(-in_features // sizes[1])
    parts = out if block.split == 1 else out.new_empty(block.split, out.numel(), dtype=torch.float32)
    with on_device_of(out):
        kernel[(len(tiles) if tiles is not None else -(-rows // block.m), across, block.split)](
            x,
            weight.codes,
            weight.scale,
            parts,
            tiles if tiles is not None else weight.scale,
            rows,
            width,
            in_features,
            x.stride(0),
            weight.row,
            weight.groups,
            weight.group,
            **constants(bits, weight.words, scales),
            EXPERTS=tiles is not None,
            SPLIT=block.split,
            BLOCK_M=block.m,
            BLOCK_N=sizes[0],
            BLOCK_K=sizes[1],
            num_warps=block.warps,
            num_stages=block.stages,
        )
        if block.split > 1:
            gpu_kernels.add_parts[(-(-out.numel() // BLOCK),)](parts, out, out.numel(), block.split, BLOCK, INTERPRETED)


def _fits_row(weight: Encoded, bits: int) -> bool:
    """Return whether every unit lies within a group."""
    return weight.groups == 1 or weight.group % UNITS[bits] == 0


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _library_rows(x: Tensor) -> int:
    return EXACT_LIBRARY_ROWS if x.dtype == torch.float32 else card(x.device).library_rows


def _even(x_MK: Tensor) -> Tensor:
    """Return ``x_MK`` with contiguous rows."""
    return x_MK if x_MK.stride(1) == 1 or x_MK.shape[1] == 1 else x_MK.contiguous()


def _check(rows: Tensor, codes: Tensor, counts: Tensor) -> None:
    """Check shapes. That the counts add up to at most the rows cannot be checked without waiting for the device."""
    if not len(counts) or len(codes) % len(counts):
        raise RuntimeError("arctic_fp8: codes must have as many rows for each expert")
    if counts.dtype != torch.int64 or counts.dim() != 1 or counts.device != rows.device:
        raise RuntimeError("arctic_fp8: counts must be int64 [experts] on the device of the input")


def _expert_block(rows: Tensor, bits: int, width: int, depth: int, experts: int) -> Block:
    """Choose the block for experts that get the same number of rows, or one each as far as the rows go."""
    active = min(experts, len(rows))
    return choose(card(rows.device), rows.dtype, bits, -(-len(rows) // active), width, depth, tiles=active)


def _tiles(counts: Tensor, rows: int, size: int) -> Tensor:
    """Return the expert, the first row and the number of rows of each block of at most ``size`` rows.

    Returns:
        int32 ``[tiles, 3]``, made on the device. There are as many tiles as any distribution of the rows needs; those
            that this one does not need have no rows.
    """
    experts = len(counts)
    tiles = counts.new_zeros(min(experts + 1, rows) + rows // size, 3, dtype=torch.int32)
    with on_device_of(tiles):
        gpu_kernels.tiles_of_experts[(1,)](
            counts, tiles, experts, rows, EXPERTS=triton.next_power_of_2(experts + 1), BLOCK_M=size
        )
    return tiles
