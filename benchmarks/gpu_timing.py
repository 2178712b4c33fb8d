"""Timing of products on a GPU whose weights are not in its cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["copies", "read_bandwidth", "seconds_each"]

TIMES_CACHE = 4
"""By how much the copies of a weight exceed the L2 cache, so that each is read from memory."""


def copies(nbytes: int, device: str) -> int:
    """Return how many copies of a weight to use in turn."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0
    return max(2, math.ceil(TIMES_CACHE * cache / nbytes))


def seconds_each(calls: Sequence[Callable[[], Any]], device: str, *, graph: bool = True, runs: int = 20) -> float:
    """Return the seconds of one of ``calls``, which do the same with different copies of a weight.

    All of them run one after the other, between two CUDA events; the result is the median of ``runs`` of these.

    Args:
        calls: they must not wait for the device.
        device: ``"cuda"`` or ``"cpu"``.
        graph: whether to replay a CUDA graph of the calls. Otherwise Python launches each, and a call that is shorter
            than its launch measures the launch.
        runs: how often.
    """
    if device == "cpu":
        times = []
        for _ in range(runs):
            since = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - since) / len(calls))
        return statistics.median(times)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # Triton compiles here, and libraries get their workspaces
        for call in [*calls[:2], *calls[-1:]]:
            call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    if graph:
        with torch.cuda.graph(captured, stream=stream):
            for call in calls:
                call()

    def go() -> None:
        if graph:
            captured.replay()
        else:
            for call in calls:
                call()

    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    with torch.cuda.stream(stream):
        go()
        for begin, end in events:
            begin.record()
            go()
            end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3 / len(calls)


def read_bandwidth(device: str, nbytes: int) -> float:
    """Return bytes per second of the fastest of torch's reductions over ``nbytes``, as a bound on reading."""
    block = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    rows, integers = block.view(-1, 1024), block.view(torch.int32)
    reductions: list[Callable[[], Tensor]] = [
        block.sum,
        block.amax,
        lambda: rows.sum(1),
        lambda: integers.sum(dtype=torch.int32),
    ]
    return nbytes / min(seconds_each([reduce], device, runs=10) for reduce in reductions)
