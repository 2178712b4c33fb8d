"""The order of events between a computation and the stream that fetches ahead of it, on a GPU that is traced."""

import random

import pytest
import torch

from arctic_plugins.frozen import Staging
from arctic_plugins.frozen.staging import slot_sizes
from arctic_plugins.testing import TracedGpu

CPU = torch.device("cpu")


def filled(gpu, value):
    def fill(memory):
        gpu.copy(memory, torch.full_like(memory, value))

    return fill


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([100], 3, [256]),
        ([512, 256, 512, 256], 2, [512, 256]),
        ([1024, 512, 256, 256], 3, [1024, 512, 256]),
        ([1024, 256, 256, 1024], 2, [1024, 1024]),  # the order repeats
        ([0, 0], 2, [0, 0]),
    ],
)
def test_slots_hold_any_consecutive_ones_and_no_more(sizes, count, expected):
    assert slot_sizes(sizes, count) == expected


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_leased_when_no_two_accesses_race(seed):
    """Leases that nest, overlap, outlive others, are dropped unused, and are used in two streams."""
    draw, gpu = random.Random(seed), TracedGpu()
    sizes = [draw.choice((64, 300, 1000)) for _ in range(6)]
    staging, other = Staging(gpu, CPU, sizes, draw.randrange(4)), gpu.new_stream()
    held = []
    for value in range(200):
        size = draw.choice(sizes)
        if (staged := staging.fetch(size, filled(gpu, value), now=draw.random() < 0.5)) is not None:
            held.append((staged, value, size))
        for _ in range(draw.randrange(3)):
            if not held:
                break
            staged, expected, size = held[at := draw.randrange(len(held))]
            for stream in draw.choice(([], [gpu.current()], [other], [gpu.current(), other])):
                with gpu.within(stream):
                    memory = staging.use(staged)
                    gpu.compute(1e-6, memory)
                    assert (memory == expected).all()
            if draw.random() < 0.7:
                staging.release(staged)
                del held[at], staged
        if draw.random() < 0.02:
            staging.resize(sizes, draw.randrange(4))
        assert not gpu.errors, gpu.errors
    for staged, _, _ in held:
        staging.release(staged)
    del held[:], staged, memory
    assert gpu.live == (0 if staging.ring is None else len(staging.ring)), "everything outside the ring is freed"


def test_the_tracer_finds_what_it_is_for():
    """Without the wait for what reads a slot, or for what fills it, the stand-in reports a race."""
    for broken in ("release", "use"):
        gpu = TracedGpu()
        staging = Staging(gpu, CPU, [100], 0)
        for value in range(2):
            staged = staging.fetch(100, filled(gpu, value), now=True)
            memory = staged.memory if broken == "use" else staging.use(staged)
            gpu.compute(1e-3, memory)
            if broken == "release":
                staged.users.clear()
            staging.release(staged)
        assert gpu.errors, broken


def test_nothing_is_allocated_once_the_ring_is():
    gpu = TracedGpu()
    staging = Staging(gpu, CPU, [1000] * 4, 2)
    ahead = [staging.fetch(1000, filled(gpu, value), now=False) for value in range(2)]
    allocated = len(gpu.allocated)
    for value in range(2, 50):
        ahead.append(staging.fetch(1000, filled(gpu, value), now=False))
        staged = ahead.pop(0)
        gpu.compute(1e-3, staging.use(staged))
        staging.release(staged)
    assert len(gpu.allocated) == allocated
    assert all(staging.fetch(1000, filled(gpu, 0), now=False) for _ in range(1))
    assert staging.fetch(1000, filled(gpu, 0), now=False) is None, "what is ahead of use does without"
    assert staging.fetch(1000, filled(gpu, 0), now=True) is not None, "what is needed now does not"
    assert len(gpu.allocated) == allocated + 1


def test_a_graph_contains_its_own_copies():
    gpu = TracedGpu()
    staging = Staging(gpu, CPU, [100] * 3, 1)
    gpu.in_graph = True
    first = staging.fetch(100, filled(gpu, 0), now=True)
    assert staging.ring is None, "a ring is not part of a graph"
    staging.release(first)
    gpu.in_graph = False
    before = staging.fetch(100, filled(gpu, 1), now=True)
    gpu.in_graph = True
    assert staging.fetch(100, filled(gpu, 2), now=False) is None
    assert staging.use(before).tolist() == [1] * 100
    staging.release(before)
    inside = staging.fetch(100, filled(gpu, 3), now=True)
    assert staging.use(inside).tolist() == [3] * 100
    staging.release(inside)
    gpu.in_graph = False
    for value in range(5):
        staged = staging.fetch(100, filled(gpu, value), now=True)
        assert staging.use(staged).tolist() == [value] * 100
        staging.release(staged)
    assert not gpu.errors
