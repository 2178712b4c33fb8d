"""Decoding, and products over encoded weights, in Triton: the device's side.

:mod:`arctic_plugins_fp8.kernels.gpu` and :mod:`arctic_plugins_fp8.kernels.gpu_products` launch these kernels.

They never ran on a GPU: they were tested in Triton's interpreter, and compiled for compute capability 8.0 and 9.0.

A row of codes is one stream of bits, whatever its groups. It is read in *units* that fill whole 32-bit words: four
codes of 8 bits in one word, 16 of 6 or eight of 12 in three. Codes are taken out of a unit by shifts that are known
when the kernel is compiled, and put back in order in registers (:func:`_codes`). A code becomes a float32 by moving its
bits into place and one multiplication, exactly; every value is also exactly a bfloat16 and a float16.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: RET505, SIM300 - Triton compiles what follows a return, unless it is in the else of a constant condition.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "CHANNEL",
    "EACH",
    "GROUP",
    "add_parts",
    "decode",
    "multiply",
    "multiply_gradient",
    "multiply_row",
    "tiles_of_experts",
]

CHANNEL, GROUP, EACH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Where scales are applied: to the sums of a whole row, to those of a block, which lies within a group, or to each
weight.
"""


@triton.jit
def _word(line, at, row, WORDS: tl.constexpr):
    """Word ``at`` of the rows that begin at ``line``: one load if codes are words, else of four bytes. ``row`` is the
    length of a row; what is beyond is zero.
    """
    if WORDS:
        return tl.load(line + at, mask=at < row, other=0)
    else:
        word = tl.load(line + at * 4, mask=at * 4 < row, other=0).to(tl.int32)
        for i in tl.static_range(1, 4):
            word |= tl.load(line + at * 4 + i, mask=at * 4 + i < row, other=0).to(tl.int32) << (8 * i)
        return word


@triton.jit
def _unit(line, unit, row, BITS: tl.constexpr, WORDS: tl.constexpr):
    """The three words of the units; those of 8 bits have one."""
    if BITS == 8:
        word = _word(line, unit, row, WORDS)
        return word, word, word
    else:
        return (
            _word(line, unit * 3, row, WORDS),
            _word(line, unit * 3 + 1, row, WORDS),
            _word(line, unit * 3 + 2, row, WORDS),
        )


@triton.jit
def _code(first, second, third, NUMBER: tl.constexpr, BITS: tl.constexpr):
    """Code ``NUMBER`` of a unit, in the highest bits of an int32 whose other bits are anything."""
    AT: tl.constexpr = NUMBER * BITS % 32
    if NUMBER * BITS // 32 == 0:
        word, after = first, second
    elif NUMBER * BITS // 32 == 1:
        word, after = second, third
    else:
        word, after = third, third
    if AT + BITS <= 32:
        return word << (32 - BITS - AT)
    else:
        OVER: tl.constexpr = AT + BITS - 32  # so many of its bits are in the next word
        return (after << (32 - OVER)) | ((word >> OVER) & ((1 << (32 - OVER)) - 1))


@triton.jit
def _value(code, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """What a code in the highest bits stands for, in float32: subnormal codes become subnormal numbers first."""
    # The shift fills with copies of the sign; one of them is where float32 has its sign, the others are cleared.
    MASK: tl.constexpr = (((1 << (BITS - 1)) - 1) << (23 - MANTISSA)) - (1 << 31)
    moved = (code >> (9 + MANTISSA - BITS)) & MASK
    return moved.to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))


@triton.jit
def _pair(first, second, third, LOW: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    return tl.interleave(
        _code(first, second, third, LOW, BITS),
        _code(first, second, third, LOW + STEP, BITS),
    )


@triton.jit
def _four(first, second, third, LOW: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    """Codes ``LOW``, ``LOW + STEP``, ... of every unit, four of them, in order."""
    return tl.interleave(
        _pair(first, second, third, LOW, 2 * STEP, BITS),
        _pair(first, second, third, LOW + STEP, 2 * STEP, BITS),
    )


@triton.jit
def _eight(first, second, third, LOW: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    return tl.interleave(
        _four(first, second, third, LOW, 2 * STEP, BITS),
        _four(first, second, third, LOW + STEP, 2 * STEP, BITS),
    )


@triton.jit
def _codes(line, unit, row, BITS: tl.constexpr, WORDS: tl.constexpr):
    """All codes of the units, in order: ``[N, units] -> [N, K]``."""
    first, second, third = _unit(line, unit, row, BITS, WORDS)
    if BITS == 8:
        return _four(first, second, third, 0, 1, BITS)
    elif BITS == 12:
        return _eight(first, second, third, 0, 1, BITS)
    else:
        return tl.interleave(_eight(first, second, third, 0, 2, BITS), _eight(first, second, third, 1, 2, BITS))


@triton.jit
def _rounded(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 to ``DTYPE``, to nearest even; the interpreter of Triton 3.9 does not round to bfloat16 so."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(value == value, nearest, 0x7FC0)
        return nearest.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def decode(
    codes,
    scale,
    out,
    out_features,
    in_features,
    row,
    groups,
    group,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    WORDS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``out[n, k] = value(code) * scale``, rounded once."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    n_read = tl.minimum(n, out_features - 1 - first)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    units = tl.program_id(1) * (BLOCK_K // UNIT) + tl.arange(0, BLOCK_K // UNIT)
    code = _codes(codes + (first + n_read) * row, units[None, :], row, BITS, WORDS)
    scale_at = scale + (first + n_read) * groups
    if SCALES == EACH:
        factor = tl.load(scale_at + tl.minimum(k // group, groups - 1)[None, :])
    else:
        factor = tl.load(scale_at + tl.program_id(1) * BLOCK_K // group)
    to = out + first * in_features + n[:, None] * in_features + k[None, :]
    mask = (n < out_features - first)[:, None] & (k < in_features)[None, :]
    tl.store(to, _rounded(_value(code, BITS, MANTISSA, BIAS) * factor, out.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def _dot(a, b, sums, INTERPRETED: tl.constexpr):
    """``sums + a @ b`` in float32. float32 operands are not shortened to tf32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def tiles_of_experts(counts, tiles, experts, rows, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Write ``tiles [tiles, 3]``: the expert, the first row and the number of rows (at most ``BLOCK_M``) of each block.

    The blocks of rows that belong to no expert, after all others, have the expert -1. One program; ``EXPERTS`` is a
    power of two above ``experts``. The caller has filled ``tiles`` with zeros: blocks without rows.
    """
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < experts, other=0).to(tl.int32)
    count = tl.where(expert == experts, rows - tl.sum(count), count)
    tile = (count + BLOCK_M - 1) // BLOCK_M
    first, first_tile = tl.cumsum(count) - count, tl.cumsum(tile) - tile
    number = tl.where(expert == experts, -1, expert)
    for at in range(tl.max(tile)):
        to = tiles + 3 * (first_tile + at)
        there = at < tile
        tl.store(to, number, mask=there)
        tl.store(to + 1, first + at * BLOCK_M, mask=there)
        tl.store(to + 2, tl.minimum(BLOCK_M, count - at * BLOCK_M), mask=there)


@triton.jit
def _rows_of(tiles, rows, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's expert and rows: from the table of tiles, or one block after another."""
    tile = tl.program_id(0)
    if EXPERTS:
        at = tiles + 3 * tile
        return tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.int64), tl.load(at + 2)
    else:
        first = tile * BLOCK_M
        return (tile * 0).to(tl.int64), first.to(tl.int64), tl.minimum(BLOCK_M, rows - first)


@triton.jit(do_not_specialize=["rows"])
def multiply(
    x,
    codes,
    scale,
    out,
    tiles,
    rows,
    out_features,
    in_features,
    stride,
    row,
    groups,
    group,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    WORDS: tl.constexpr,
    SCALES: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``out[m, n] = sum_k x[m, k] * w[n, k]``, or the part ``program_id(2)`` of the sum."""
    expert, first, inside = _rows_of(tiles, rows, EXPERTS, BLOCK_M)
    n_first, part = tl.program_id(1) * BLOCK_N, tl.program_id(2)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    n_read = tl.minimum(n, out_features - 1 - n_first)  # the last row again instead of rows that are not
    line = expert * out_features + n_first
    code_at = codes + line * row + (n_read * row)[:, None]
    scale_at = scale + line * groups + n_read * groups
    x_at = x + first * stride + (m * stride)[:, None]
    blocks = tl.cdiv(in_features, BLOCK_K)
    each = tl.cdiv(blocks, SPLIT)
    if EXPERTS:
        blocks *= ((expert >= 0) & (inside > 0)).to(tl.int32)  # rows of no expert become zero
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(part * each, tl.minimum(blocks, part * each + each)):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        units = block * (BLOCK_K // UNIT) + tl.arange(0, BLOCK_K // UNIT)
        a = tl.load(x_at + k[None, :], mask=(m < inside)[:, None] & (k < in_features)[None, :], other=0.0)
        w = _value(_codes(code_at, units[None, :], row, BITS, WORDS), BITS, MANTISSA, BIAS)
        if SCALES == EACH:
            which = tl.minimum(k // group, groups - 1)
            w = _rounded(w * tl.load(scale_at[:, None] + which[None, :]), a.dtype, INTERPRETED)
            sums = _dot(a, tl.trans(w), sums, INTERPRETED)
        elif SCALES == GROUP:
            factor = tl.load(scale_at + block * BLOCK_K // group)
            nothing = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            sums += _dot(a, tl.trans(w.to(a.dtype)), nothing, INTERPRETED) * factor[None, :]
        else:
            sums = _dot(a, tl.trans(w.to(a.dtype)), sums, INTERPRETED)
    if SCALES == CHANNEL:
        sums *= tl.load(scale_at, mask=n_read + expert * out_features >= 0, other=0.0)[None, :]
    to = out + (part.to(tl.int64) * rows + first) * out_features + n_first + m[:, None] * out_features + n[None, :]
    mask = (m < inside)[:, None] & (n < out_features - n_first)[None, :]
    tl.store(to, _rounded(sums, out.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def multiply_gradient(
    grad,
    codes,
    scale,
    out,
    tiles,
    rows,
    out_features,
    in_features,
    stride,
    row,
    groups,
    group,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    WORDS: tl.constexpr,
    SCALES: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``out[m, k] = sum_n grad[m, n] * w[n, k]``, or the part ``program_id(2)`` of the sum.

    These sums are over rows with scales of their own, so the weights are scaled, and rounded to the dtype of ``grad``.
    """
    expert, first, inside = _rows_of(tiles, rows, EXPERTS, BLOCK_M)
    k_first, part = tl.program_id(1) * BLOCK_K, tl.program_id(2)
    m, k = tl.arange(0, BLOCK_M), k_first + tl.arange(0, BLOCK_K)
    units = tl.program_id(1) * (BLOCK_K // UNIT) + tl.arange(0, BLOCK_K // UNIT)
    which = tl.minimum(k // group, groups - 1)
    grad_at = grad + first * stride + (m * stride)[:, None]
    blocks = tl.cdiv(out_features, BLOCK_N)
    each = tl.cdiv(blocks, SPLIT)
    if EXPERTS:
        blocks *= ((expert >= 0) & (inside > 0)).to(tl.int32)
    sums = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for block in range(part * each, tl.minimum(blocks, part * each + each)):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        n_read = tl.minimum(tl.arange(0, BLOCK_N), out_features - 1 - block * BLOCK_N)
        line = expert * out_features + block * BLOCK_N
        a = tl.load(grad_at + n[None, :], mask=(m < inside)[:, None] & (n < out_features)[None, :], other=0.0)
        code_at = codes + line * row + (n_read * row)[:, None]
        w = _value(_codes(code_at, units[None, :], row, BITS, WORDS), BITS, MANTISSA, BIAS)
        scale_at = scale + line * groups + (n_read * groups)[:, None]
        if SCALES == EACH:
            w *= tl.load(scale_at + which[None, :])
        else:
            w *= tl.load(scale_at + k_first // group)
        sums = _dot(a, _rounded(w, a.dtype, INTERPRETED), sums, INTERPRETED)
    to = out + (part.to(tl.int64) * rows + first) * in_features + m[:, None] * in_features + k[None, :]
    mask = (m < inside)[:, None] & (k < in_features)[None, :]
    tl.store(to, _rounded(sums, out.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def multiply_row(
    x,
    codes,
    scale,
    out,
    out_features,
    in_features,
    row,
    groups,
    group,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    WORDS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """:func:`multiply` for one row, in float32 and without matrix units. The threads of a program split K among them:
    each sums its units of every row, and the sums of all are added at the end.
    """
    n_first = tl.program_id(0) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    n_read = tl.minimum(n, out_features - 1 - n_first)
    code_at = codes + n_first.to(tl.int64) * row + (n_read * row)[:, None]
    scale_at = scale + n_first.to(tl.int64) * groups + n_read * groups
    sums = tl.zeros((BLOCK_N, BLOCK_UNITS), tl.float32)
    for start in range(0, tl.cdiv(in_features, UNIT), BLOCK_UNITS):
        units = start + tl.arange(0, BLOCK_UNITS)
        first, second, third = _unit(code_at, units[None, :], row, BITS, WORDS)
        own = tl.zeros((BLOCK_N, BLOCK_UNITS), tl.float32) if SCALES == GROUP else sums
        for number in tl.static_range(UNIT):
            k = units * UNIT + number
            a = tl.load(x + k, mask=k < in_features, other=0.0).to(tl.float32)
            own = tl.fma(_value(_code(first, second, third, number, BITS), BITS, MANTISSA, BIAS), a[None, :], own)
        if SCALES == GROUP:
            which = tl.minimum(units * UNIT // group, groups - 1)
            sums += own * tl.load(scale_at[:, None] + which[None, :])
        else:
            sums = own
    y = tl.sum(sums, axis=1)
    if SCALES == CHANNEL:
        y *= tl.load(scale_at)
    tl.store(out + n_first + n, _rounded(y, out.dtype.element_ty, INTERPRETED), mask=n < out_features - n_first)


@triton.jit
def add_parts(parts, out, size, SPLIT: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """``out = parts.sum(0)``, always in the same order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        sums += tl.load(parts + part * size + at, mask=at < size, other=0.0)
    tl.store(out + at, _rounded(sums, out.dtype.element_ty, INTERPRETED), mask=at < size)
