"""The laws of placements, wherever they keep bytes."""

from __future__ import annotations

import copy
import gc
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from arctic_plugins.errors import ClaimError
from arctic_plugins.testing.suite import Suite

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef

    from arctic_plugins.frozen import Handle, Placement

__all__ = ["PlacementSuite"]

Held: TypeAlias = "dict[str, tuple[Handle, dict[str, Tensor]]]"
"""Name -> the handle, and a copy of the buffers that it was given."""


class PlacementSuite(Suite):
    """The laws of :class:`arctic_plugins.frozen.Placement` and :class:`~arctic_plugins.frozen.Handle`::

        class TestMyPlacement(PlacementSuite):
            def make(self, directory):
                return MyPlacement(directory)

    Weights are leased on the CPU. In each process of a distributed run, ``TestMyPlacement().check(tmp_path=...)`` runs
    the laws for a placement that spreads weights.
    """

    def make(self, directory: Path) -> Placement:
        """Return a new placement, as a plugin's ``claim`` hook would, which may keep its files in ``directory``."""
        raise NotImplementedError(f"{type(self).__name__} does not define make()")

    def ready(self, directory: Path) -> Placement:
        """Return a new placement that has planned the weights of the laws."""
        placement = self.make(directory)
        placement.plan(dict.fromkeys(_buffers(), 1000))
        return placement

    def test_plan_takes_what_is_offered(self, tmp_path: Path) -> None:
        sizes = {f"layers.{index}.mlp": 1024 * (index + 1) for index in range(4)}
        plan = self.make(tmp_path).plan(sizes)
        assert plan.keys() <= sizes.keys(), "plan() takes weights that it was not offered"
        assert all(0 <= left <= sizes[name] for name, left in plan.items()), (
            "plan() leaves more bytes on the device than the weight has"
        )

    def test_bytes_come_back(self, tmp_path: Path) -> None:
        _leases(held := _hold(self.ready(tmp_path)))
        for name, (handle, expected) in held.items():
            _same(handle.export(), expected, f"the export of {name}")

    def test_bytes_do_not_depend_on_the_order_of_leases(self, tmp_path: Path) -> None:
        import torch

        held = _hold(self.ready(tmp_path))
        names, generator = list(held), torch.Generator().manual_seed(0)
        for _ in range(3):  # forward and backward, until that is what comes next
            _leases(held, [*names, *reversed(names)])
        for _ in range(4):
            _leases(held, [names[at] for at in torch.randint(len(names), (6,), generator=generator).tolist()])

    def test_bytes_do_not_depend_on_the_order_of_arrival(self, tmp_path: Path) -> None:
        _leases(_hold(self.ready(tmp_path), list(reversed(_buffers()))))

    def test_memory_that_it_takes_over_is_released(self, tmp_path: Path) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        placement, handles = self.ready(tmp_path), []
        for name, buffers in _buffers().items():
            storages = {suffix: StorageWeakRef(buffer.untyped_storage()) for suffix, buffer in buffers.items()}
            handles.append(placement.hold(name, buffers))
            buffers.clear()
            kept = [suffix for suffix, storage in storages.items() if not _expired(storage)]
            assert not kept, (
                f"the memory of {[name + suffix for suffix in kept]} stays in use although it was taken over"
            )

    def test_memory_is_released_with_the_placement(self, tmp_path: Path) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        held = _hold(placement := self.ready(tmp_path))
        _leases(held)
        storages = [
            StorageWeakRef(buffer.untyped_storage())
            for handle, _ in held.values()
            for buffer in handle.export().values()
        ]
        del held, placement
        assert all(map(_expired, storages)), "memory stays in use after placement and handles are gone"

    def test_leases_nest(self, tmp_path: Path) -> None:
        held = _hold(self.ready(tmp_path))
        for name, (handle, expected) in held.items():
            with handle.lease(_cpu()) as outer:
                with handle.lease(_cpu()) as inner:
                    _same(inner, expected, f"a lease of {name} within a lease")
                _same(outer, expected, f"a lease of {name} after one within it has ended")
                for other, (another, theirs) in held.items():
                    if other != name:
                        with another.lease(_cpu()) as buffers:
                            _same(buffers, theirs, f"a lease of {other} during one of {name}")
                _same(outer, expected, f"a lease of {name} after others were leased")

    def test_a_lease_that_fails_leaves_the_weight_usable(self, tmp_path: Path) -> None:
        held = _hold(self.ready(tmp_path))
        for handle, _ in held.values():
            with pytest.raises(KeyError), handle.lease(_cpu()):
                raise KeyError
        _leases(held)

    def test_leases_of_several_threads_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        placement = self.ready(tmp_path)
        if placement.collective:
            pytest.skip("a collective placement is leased in the same order in all processes")
        held, failures, together = _hold(placement), [], threading.Barrier(2)
        _leases(held)

        def lease(names: list[str]) -> None:
            try:
                together.wait()
                _leases(held, names * 5)
            except BaseException as error:
                failures.append(error)

        orders = [list(held), list(reversed(held))]
        threads = [threading.Thread(target=lease, args=(names,)) for names in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise AssertionError(f"a lease in another thread fails: {failures[0]}") from failures[0]

    def test_a_copy_of_a_module_borrows_the_same_bytes(self, tmp_path: Path) -> None:
        placement = self.ready(tmp_path)
        assert copy.deepcopy(placement) is placement, "a placement is one object for every copy of a model"
        for name, (handle, _) in _hold(placement).items():
            assert copy.deepcopy(handle) is handle, f"the handle of {name} is one object for every copy of a module"

    def test_a_weight_that_changes_gets_new_bytes(self, tmp_path: Path) -> None:
        held = _hold(placement := self.ready(tmp_path))
        for name, (old, expected) in held.items():
            changed = {suffix: buffer + 1 for suffix, buffer in expected.items()}
            new = placement.hold(name, {suffix: buffer.clone() for suffix, buffer in changed.items()})
            with old.lease(_cpu()) as before:
                _same(before, expected, f"the old handle of {name}")
            with new.lease(_cpu()) as after:
                _same(after, changed, f"the new handle of {name}")

    def test_a_placement_after_it_gets_the_bytes_or_is_refused(self, tmp_path: Path) -> None:
        following = _following()
        try:
            held = _hold(self.ready(tmp_path), inner=following)
        except ClaimError:
            return
        assert following.names == list(held), "hold() ignores the placement that comes after it; expected ClaimError"
        _leases(held)

    def test_a_save_that_is_killed_does_no_harm(self, tmp_path: Path) -> None:
        placement = self.ready(tmp_path)
        if placement.collective:
            pytest.skip("a collective placement exports in all processes together")
        held = _hold(placement)
        child = os.fork()
        if not child:
            try:
                for handle, expected in held.values():
                    _same(handle.export(), expected, "an export in a forked process")
                os.kill(os.getpid(), signal.SIGKILL)  # before anything is cleaned up
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, f"export() fails in a process forked from this one (status {status})"
        _leases(held)
        _leases(_hold(self.ready(tmp_path)))  # as the next run would

    def test_description_is_one_line(self, tmp_path: Path) -> None:
        described = self.ready(tmp_path).describe()
        assert described, "describe() returns an empty string"
        assert "\n" not in described, "describe() returns several lines"


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


def _expired(storage: StorageWeakRef) -> bool:
    """Return whether memory is free, if need be after collecting what refers to itself."""
    return storage.expired() or (gc.collect() >= 0 and storage.expired())


def _buffers() -> dict[str, dict[str, Tensor]]:
    """Return name -> buffers, of odd sizes, in the dtypes of codes and of plain weights."""
    import torch

    generator = torch.Generator().manual_seed(0)
    found = {}
    for index, dtype in enumerate((torch.uint8, torch.int8, torch.bfloat16, torch.float32, torch.float16)):
        codes = torch.randint(0, 100, (3, 5 + index, 7), generator=generator).to(dtype)
        found[f"layers.{index}.mlp.weight"] = {"": codes, "_scale": torch.rand(3, 5 + index, generator=generator)}
    return found


def _hold(placement: Placement, names: Iterable[str] | None = None, inner: Placement | None = None) -> Held:
    found = _buffers()
    return {
        name: (
            placement.hold(name, {suffix: buffer.clone() for suffix, buffer in found[name].items()}, inner),
            found[name],
        )
        for name in names or found
    }


def _leases(held: Held, names: Iterable[str] | None = None) -> None:
    """Lease the weights in turn, and check their bytes."""
    for name in held if names is None else names:
        handle, expected = held[name]
        with handle.lease(_cpu()) as buffers:
            _same(buffers, expected, f"a lease of {name}")


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    import torch

    assert found.keys() == expected.keys(), f"{what} has the buffers {sorted(found)}; expected {sorted(expected)}"
    for suffix, buffer in expected.items():
        other = found[suffix]
        assert (other.dtype, other.shape) == (buffer.dtype, buffer.shape), (
            f"{what} has '{suffix}' as {other.dtype} {tuple(other.shape)}; "
            f"expected {buffer.dtype} {tuple(buffer.shape)}"
        )
        assert torch.equal(other, buffer), f"{what} has other bytes in '{suffix}' than were given to the placement"


def _following() -> Any:
    """Return a placement that keeps buffers as they are, and the ``names`` of the weights."""
    from arctic_plugins.frozen import Handle, Placement

    class Kept(Handle):
        def __init__(self, buffers: Mapping[str, Tensor]) -> None:
            self.buffers = dict(buffers)

        @contextmanager
        def lease(self, device: torch.device) -> Iterator[Mapping[str, Tensor]]:
            yield self.buffers

        def export(self) -> dict[str, Tensor]:
            return dict(self.buffers)

    class Following(Placement):
        def __init__(self) -> None:
            self.names: list[str] = []

        def hold(self, name: str, buffers: Mapping[str, Tensor], inner: Placement | None = None) -> Handle:
            self.names.append(name)
            return Kept(buffers)

    return Following()
