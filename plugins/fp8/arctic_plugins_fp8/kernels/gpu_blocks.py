"""Sizes of the Triton kernels' blocks, by compute capability and by the shape of the product.

Nothing here was measured: the numbers follow from what a card of the capability has (multiprocessors, registers, shared
memory), and from the code that Triton generates for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

__all__ = ["Block", "Card", "RowBlock", "card", "choose", "choose_row"]


@dataclass(frozen=True)
class Block:
    """How a product is cut: a program has ``m`` rows of x and ``n x k`` weights at a time.

    ``split`` programs share a sum, over K, or for gradients over N.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int = 1


@dataclass(frozen=True)
class RowBlock:
    """The same for a single row of x: ``n`` rows of codes, ``units`` units of each at a time."""

    n: int
    units: int
    warps: int


@dataclass(frozen=True)
class Card:
    """Properties of the cards of one compute capability."""

    processors: int
    """Number of multiprocessors. A launch should have at least as many programs, or better, several times as many."""
    blocks: tuple[Block, ...]
    """Blocks by increasing ``m``. The first with ``m`` not below the number of rows is used, or the last."""
    library_rows: int
    """From this number of rows on, it is estimated to be faster to decode the weight once and use the library."""


_FEW = (Block(16, 64, 128, 4, 4), Block(32, 64, 128, 4, 4), Block(64, 64, 64, 4, 4))
CARDS = {
    (8, 0): Card(108, (*_FEW, Block(128, 128, 64, 8, 3)), 1024),
    (9, 0): Card(132, (*_FEW, Block(128, 128, 64, 8, 4)), 1024),
}
OTHER = Card(64, (Block(16, 64, 64, 4, 3), Block(32, 64, 64, 4, 3), Block(64, 64, 64, 4, 3)), 512)
"""For every other capability; within 64 KiB of shared memory."""
EXACT = (Block(16, 32, 32, 4, 2), Block(32, 32, 32, 4, 2))
"""For float32, which is multiplied without matrix units."""
EXACT_LIBRARY_ROWS = 64

PARTS, SHORTEST_PART = 16, 512
"""The most programs that share a sum, and the fewest products that each of them has."""
PARTIAL_BYTES = 8
"""Bytes to write and read a partial sum. In total they should be fewer than the weight's, about one per number."""
WAVES = 2
"""Programs per multiprocessor up to which sums are split."""
THREADS = 32


@cache
def card(device: torch.device) -> Card:
    """Return the table's entry for ``device``."""
    if device.type != "cuda" or torch.version.hip is not None:  # the interpreter; AMD's capabilities are others
        return OTHER
    return CARDS.get(torch.cuda.get_device_capability(device), OTHER)


@cache
def choose(on: Card, dtype: torch.dtype, rows: int, width: int, depth: int, *, tiles: int = 0) -> Block:
    """Return the block for ``rows`` rows and ``width`` sums of ``depth`` products per row.

    ``tiles``: for experts, the number of blocks of rows, at least one per expert; their sums are not split.
    """
    blocks = EXACT if dtype == torch.float32 else on.blocks
    block = next((block for block in blocks if block.m >= rows), blocks[-1])
    programs, split = (tiles or -(-rows // block.m)) * -(-width // block.n), 1
    most = 1 if tiles else min(PARTS, depth // SHORTEST_PART, depth // (PARTIAL_BYTES * rows))
    while 2 * split <= most and programs * split < WAVES * on.processors:
        split *= 2
    return replace(block, split=split)


@cache
def choose_row(on: Card, width: int, depth: int, bits: int, unit: int) -> RowBlock:
    """Return the block for a single row: each thread has four consecutive words of 8-bit codes, or one other unit."""
    warps = 4 if depth >= 2048 else 2
    rows = 8 if width >= 8 * WAVES * on.processors else 4
    units = warps * THREADS * (4 if bits == 8 else 1)
    while units > 16 and units * unit >= 2 * depth:
        units //= 2
    return RowBlock(rows, units, warps)
