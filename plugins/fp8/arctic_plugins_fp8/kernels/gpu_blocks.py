"""Sizes of the Triton kernels' blocks, by compute capability, format and shape of the product.

The table is ``gpu_blocks.json``, which ``benchmarks/gpu_tune.py`` writes. An entry without ``measured_on`` was not
measured: its numbers follow from what cards of the capability have (multiprocessors, registers, shared memory), and
from the code that Triton generates for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["EXACT_LIBRARY_ROWS", "TABLE", "Block", "Card", "RowBlock", "card", "card_of", "choose", "choose_row"]

TABLE = Path(__file__).with_suffix(".json")


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


@dataclass(frozen=True, eq=False)
class Card:
    """An entry of the table, and the number of multiprocessors of a card."""

    processors: int
    """A launch should have at least as many programs, or better, several times as many."""
    blocks: Mapping[int, tuple[Block, ...]]
    """Bits -> blocks by increasing ``m``. The first with ``m`` not below the number of rows is used, or the last."""
    rows: Mapping[int, tuple[int, int]]
    """Bits -> for a single row of x, the rows of codes of a program, and its warps."""
    library_rows: int
    """From this number of rows on, decoding the weight once and using the library's product is faster."""
    measured_on: str = ""
    """The card's name and the versions used; "" if the entry was never measured."""

    @classmethod
    def of(cls, entry: Mapping[str, Any], processors: int) -> Card:
        """Read an entry of the table."""
        blocks = {int(bits): tuple(Block(*sizes) for sizes in rows) for bits, rows in entry["blocks"].items()}
        rows = {int(bits): (rows, warps) for bits, (rows, warps) in entry["rows"].items()}
        return cls(processors, blocks, rows, entry["library_rows"], entry["measured_on"])


EXACT = (Block(16, 32, 32, 4, 2), Block(32, 32, 32, 4, 2))
"""For float32, which is multiplied without matrix units."""
EXACT_LIBRARY_ROWS = 64
PROCESSORS = 64
"""Number of multiprocessors assumed where there is no card: in Triton's interpreter."""
PARTS, SHORTEST_PART = 16, 512
"""The most programs that share a sum, and the fewest products that each of them has."""
PARTIAL_BYTES = 8
"""Bytes to write and read a partial sum. In total they should be fewer than the weight's, about one per number."""
WAVES = 2
"""Programs per multiprocessor up to which sums are split."""
THREADS = 32


@cache
def card(device: torch.device) -> Card:
    """Return the properties of ``device``."""
    if device.type != "cuda" or torch.version.hip is not None:  # the interpreter; AMD's capabilities are others
        return card_of("other", PROCESSORS)
    major, minor = torch.cuda.get_device_capability(device)
    return card_of(f"{major}.{minor}", torch.cuda.get_device_properties(device).multi_processor_count)


def card_of(capability: str, processors: int) -> Card:
    """Return the table's entry for a compute capability like ``9.0``, or the one for cards that are not in the table.

    That one stays within 64 KiB of shared memory.
    """
    table = json.loads(TABLE.read_text())
    return Card.of(table.get(capability, table["other"]), processors)


@cache
def choose(on: Card, dtype: torch.dtype, bits: int, rows: int, width: int, depth: int, *, tiles: int = 0) -> Block:
    """Return the block for ``rows`` rows and ``width`` sums of ``depth`` products per row.

    ``tiles``: for experts, the number of blocks of rows, at least one per expert; their sums are not split.
    """
    blocks = EXACT if dtype == torch.float32 else on.blocks[bits]
    block = next((block for block in blocks if block.m >= rows), blocks[-1])
    programs, split = (tiles or -(-rows // block.m)) * -(-width // block.n), 1
    most = 1 if tiles else min(PARTS, depth // SHORTEST_PART, depth // (PARTIAL_BYTES * rows))
    while 2 * split <= most and programs * split < WAVES * on.processors:
        split *= 2
    return replace(block, split=split)


@cache
def choose_row(on: Card, width: int, depth: int, bits: int, unit: int) -> RowBlock:
    """Return the block for a single row: each thread has four consecutive words of 8-bit codes, or one other unit."""
    rows, warps = on.rows[bits]
    while rows > 1 and width < rows * WAVES * on.processors:
        rows //= 2
    warps = warps if depth >= 2048 else max(1, warps // 2)
    units = warps * THREADS * (4 if bits == 8 else 1)
    while units > 16 and units * unit >= 2 * depth:
        units //= 2
    return RowBlock(rows, units, warps)
