"""Measure block sizes of fp8's Triton kernels on this card, and print or write its entry of their table.

    python benchmarks/gpu_tune.py [--bits 8] [--minutes 10] [--write]

Starts from the entry in use. For each format and number of rows, one size after another is varied and the fastest value
kept, until none is faster; a change has to gain 2 %. Times are those of the layers of a Llama 3.1 8B, forward and for
the gradient, with a cold cache (``triton.testing.do_bench``). For the first format it also finds the number of rows
from which decoding the whole weight and using the library's product is faster. Run it on an idle card, then
``make gpu``, and commit the table. **It never ran on a GPU.**
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from functools import partial
from math import exp, inf, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arctic_plugins_fp8.kernels.gpu_blocks import Block, Card

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins" / "fp8")]

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = {16: 8, 32: 32, 64: 64, 128: 512}
"""m of a block -> rows of x with which it is measured."""
GAIN = 0.98
SIZES = {"n": (16, 32, 64, 128, 256), "k": (32, 64, 128, 256), "warps": (2, 4, 8), "stages": (2, 3, 4, 5)}
ROW_SIZES = ((1, 2, 4, 8, 16), (1, 2, 4, 8))
LIBRARY_ROWS = (128, 256, 512, 1024, 2048, 4096)
NEVER = 1 << 30


def descend(
    start: Any, measure: Callable[[Any], float], neighbours: Callable[[Any], Iterator[Any]], deadline: float
) -> Any:
    """Return the best block that is found from ``start`` by changing one size at a time, until ``deadline``."""
    times = {start: measure(start)}
    best, improved = start, True
    while improved:
        improved = False
        for block in neighbours(best):
            if block in times:
                continue
            if time.monotonic() > deadline:
                return best
            times[block] = measure(block)
            if times[block] < GAIN * times[best]:
                best, improved = block, True
    return best


def of_block(block: Block) -> Iterator[Block]:
    """Yield the blocks that differ from ``block`` in one size."""
    for name, values in SIZES.items():
        yield from (replace(block, **{name: value}) for value in values if value != getattr(block, name))


def of_row(row: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the rows and warps of a program for a single row of x that differ from ``row`` in one number."""
    yield from ((rows, row[1]) for rows in ROW_SIZES[0] if rows != row[0])
    yield from ((row[0], warps) for warps in ROW_SIZES[1] if warps != row[1])


class Layers:
    """Encoded layers of one format on the card, and the times of their products."""

    def __init__(self, bits: int) -> None:
        import torch
        from arctic_plugins_fp8.codec import FP8Codec

        self.bits, self.weights = bits, []
        for shape in SHAPES:
            buffers = FP8Codec(bits=bits).encode(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
            self.weights.append((shape, buffers[""], buffers["_scale"]))

    def time(self, on: Card, rows: int, *, whole: bool = False) -> float:
        """Return milliseconds of ``rows`` rows with the blocks of ``on``, or with the weight decoded as a ``whole``.

        Infinite if a kernel needs more than the card has.
        """
        import torch
        from arctic_plugins_fp8.kernels import gpu_products, reference
        from arctic_plugins_fp8.kernels.gpu_blocks import choose, choose_row
        from triton.runtime.errors import OutOfResources
        from triton.testing import do_bench

        bits, times = self.bits, []
        for shape, *weight in self.weights:
            for forward, (width, depth) in ((True, shape), (False, shape[::-1])):
                if rows == 1 and not forward:
                    continue  # a single row is generating, which has no gradient
                x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
                more = {} if forward else {"in_features": width}
                if whole:
                    function, blocks = (reference.linear if forward else reference.grad_input), {}
                elif rows == 1:
                    function = gpu_products.fused_linear
                    blocks = {"block": choose_row(on, width, depth, bits, gpu_products.UNITS[bits])}
                else:
                    function = gpu_products.fused_linear if forward else gpu_products.fused_grad_input
                    blocks = {"block": choose(on, x.dtype, bits, rows, width, depth)}
                call = partial(function, x, *weight, bits, **more, **blocks)
                try:
                    times.append(do_bench(call, warmup=3, rep=20, return_mode="median"))
                except OutOfResources:
                    return inf
        return exp(sum(map(log, times)) / len(times))  # so that no shape outweighs the others


def tuned(on: Card, bits: int, time_of: Callable[[Card, int], float], deadline: float) -> Card:
    """Return ``on`` with the fastest blocks of one format; ``time_of`` a card's entry and a number of rows."""
    blocks = []
    for start in on.blocks[bits]:

        def block_time(block: Block, rows: int = ROWS[start.m]) -> float:
            return time_of(replace(on, blocks={bits: (block,)}), rows)

        blocks.append(descend(start, block_time, of_block, deadline))
        print(f"{bits} bits: {blocks[-1]}", flush=True)

    def row_time(numbers: tuple[int, int]) -> float:
        return time_of(replace(on, rows={bits: numbers}), 1)

    row = descend(on.rows[bits], row_time, of_row, deadline)
    print(f"{bits} bits, a single row: {row}", flush=True)
    return replace(on, blocks={**on.blocks, bits: tuple(blocks)}, rows={**on.rows, bits: row})


def as_text(table: dict[str, Any]) -> str:
    """Return the table as JSON with a line for each format."""
    entries = []
    for capability, entry in table.items():
        blocks = ",\n".join(f'      "{bits}": {json.dumps(rows)}' for bits, rows in entry["blocks"].items())
        fields = [f'    "{key}": {json.dumps(value)}' for key, value in entry.items() if key != "blocks"]
        body = ",\n".join([*fields, f'    "blocks": {{\n{blocks}\n    }}'])
        entries.append(f'  "{capability}": {{\n{body}\n  }}')
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main() -> None:
    """Measure, and print the table or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 12], choices=(8, 6, 12))
    parser.add_argument("--minutes", type=float, default=10, help="after which no further block is tried")
    parser.add_argument("--write", action="store_true", help="write the table instead of printing it")
    options = parser.parse_args()
    import torch
    import triton
    from arctic_plugins_fp8.kernels import gpu_blocks

    if not torch.cuda.is_available() or torch.version.hip is not None:
        sys.exit("found no NVIDIA GPU; the blocks of a card can only be measured on that card")
    on = gpu_blocks.card(torch.device("cuda"))
    until = time.monotonic() + 60 * options.minutes
    for done, bits in enumerate(options.bits):
        layers = Layers(bits)
        share = (until - time.monotonic()) / (len(options.bits) - done)
        on = tuned(on, bits, layers.time, time.monotonic() + share)
        if bits == options.bits[0]:
            faster = (rows for rows in LIBRARY_ROWS if layers.time(on, rows, whole=True) < layers.time(on, rows))
            on = replace(on, library_rows=next(faster, NEVER))
    table = json.loads(gpu_blocks.TABLE.read_text())
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    table[capability] = {
        "measured_on": f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}",
        "library_rows": on.library_rows,
        "rows": on.rows,
        "blocks": {bits: [astuple(block)[:-1] for block in blocks] for bits, blocks in on.blocks.items()},
    }
    text = as_text(table)
    if options.write:
        gpu_blocks.TABLE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
