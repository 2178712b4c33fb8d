"""Checks that every placement must pass, wherever it keeps bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arctic_plugins.frozen import Handle, Placement

__all__ = ["check_placement"]


def check_placement(make: Callable[[], Placement]) -> None:
    """Check that placements and their handles obey their protocols, in one process.

    The protocols are :class:`arctic_plugins.frozen.Placement` and :class:`~arctic_plugins.frozen.Handle`.

    Args:
        make: returns a new placement, as a plugin's ``claim`` hook would.

    Raises:
        AssertionError: if a law is broken; the message names the law.
    """
    import copy

    import torch

    placement, cpu = make(), torch.device("cpu")
    sizes = {f"layers.{index}.mlp": 1024 * (index + 1) for index in range(4)}
    plan = placement.plan(sizes)
    assert plan.keys() <= sizes.keys(), "plan() takes weights that it was not offered"
    assert all(0 <= left <= sizes[name] for name, left in plan.items()), (
        "plan() leaves more bytes on the device than the weight has"
    )
    assert copy.deepcopy(placement) is placement, "a placement is one object for every copy of a model"
    generator = torch.Generator().manual_seed(0)
    handles: dict[str, tuple[Handle, dict[str, torch.Tensor]]] = {}
    for name, dtype in (
        (f"layers.{index}.mlp.weight", dtype)
        for index, dtype in enumerate((torch.uint8, torch.int8, torch.bfloat16, torch.float32))
    ):
        codes = torch.randint(0, 100, (3, 5, 7), generator=generator).to(dtype)
        buffers = {"": codes, "_scale": torch.rand(3, 5, generator=generator)}
        handles[name] = (placement.hold(name, {suffix: buffer.clone() for suffix, buffer in buffers.items()}), buffers)
    assert placement.describe(), "describe() returns an empty string"
    for _ in range(2):
        for name in [*handles, *reversed(handles)]:
            handle, expected = handles[name]
            assert copy.deepcopy(handle) is handle, "a handle is one object for every copy of a module"
            with handle.lease(cpu) as leased:
                assert leased.keys() == expected.keys(), f"lease of {name} has different buffers"
                with handle.lease(cpu) as again:
                    assert all(torch.equal(again[suffix], buffer) for suffix, buffer in expected.items()), (
                        f"a lease of {name} within a lease differs"
                    )
                for suffix, buffer in expected.items():
                    assert leased[suffix].dtype == buffer.dtype, f"lease of {name}{suffix} changes its dtype"
                    assert torch.equal(leased[suffix], buffer), f"lease of {name}{suffix} differs from what was held"
    for name, (handle, expected) in handles.items():
        assert all(torch.equal(buffer, expected[suffix]) for suffix, buffer in handle.export().items()), (
            f"export of {name} differs from what was held"
        )
    name, (old, expected) = next(iter(handles.items()))
    new = placement.hold(name, {suffix: buffer + 1 for suffix, buffer in expected.items()})
    with old.lease(cpu) as before, new.lease(cpu) as after:
        assert torch.equal(before[""], expected[""]), "a handle changed when its weight got a new handle"
        assert torch.equal(after[""], expected[""] + 1), "a weight that is held again keeps its old bytes"
