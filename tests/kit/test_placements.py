"""Each law of placements finds the placements that break it, and only those."""

import copy
import os
import threading
from contextlib import contextmanager

import pytest

from arctic_plugins.errors import ClaimError
from arctic_plugins.frozen import Handle, LeaseOrder, Placement, chain
from arctic_plugins.testing import PlacementSuite

KEPT, STARTED = [], os.getpid()


class Kept(Handle):
    """A weight in memory of its own."""

    def __init__(self, placement, name, buffers):
        self.placement, self.name = placement, name
        self.buffers = {suffix: buffer.clone() for suffix, buffer in buffers.items()}

    @contextmanager
    def lease(self, device):
        yield dict(self.buffers)

    def export(self):
        return dict(self.buffers)


class Sound(Placement):
    handle = Kept

    def __init__(self, directory):
        self.directory = directory

    def hold(self, name, buffers, inner=None):
        if inner is not None:
            raise ClaimError("it keeps everything")
        return self.handle(self, name, buffers)


def of(handle):
    """A placement with this kind of handle."""
    return type(handle.__name__, (Sound,), {"handle": handle})


class TestSound(PlacementSuite):
    def make(self, directory):
        return Sound(directory)


class TestChain(PlacementSuite):
    """A placement that passes on what it keeps, before one that does not."""

    def make(self, directory):
        class Passes(Sound):
            def hold(self, name, buffers, inner=None):
                return Sound.hold(self, name, buffers) if inner is None else inner.hold(name, buffers)

        return chain([Passes(directory), Sound(directory)])


class TakesMore(Sound):
    def plan(self, nbytes):
        return {**super().plan(nbytes), "lm_head": 0}


class LeavesMore(Sound):
    def plan(self, nbytes):
        return {name: size + 1 for name, size in nbytes.items()}


class Casts(Kept):
    def export(self):
        return {suffix: buffer.double() for suffix, buffer in self.buffers.items()}


class Forgets(Kept):
    def __init__(self, placement, name, buffers):
        super().__init__(placement, name, buffers)
        if name.startswith("layers.2."):
            self.buffers[""] = self.buffers[""].flip(-1)


class InOrder(Kept):
    """It lends what came next the last time, whatever is asked for."""

    @contextmanager
    def lease(self, device):
        handles, order = self.placement.__dict__.setdefault(threading.get_ident(), ({}, LeaseOrder()))
        handles[self.name] = self
        [name] = order.upcoming(1) or [self.name]
        order.leased(self.name)
        yield dict(handles[name].buffers)


class ByArrival(Sound):
    def hold(self, name, buffers, inner=None):
        handle = super().hold(name, buffers, inner)
        first = self.__dict__.setdefault("first", name)
        if first.startswith("layers.4"):
            handle.buffers["_scale"] += 1
        return handle


class Shares(Kept):
    def __init__(self, placement, name, buffers):
        super().__init__(placement, name, buffers)
        self.buffers = dict(buffers)


class Leaks(Kept):
    def __init__(self, placement, name, buffers):
        super().__init__(placement, name, buffers)
        KEPT.append(self)


class FreesAtOnce(Kept):
    """Leases of a thread share memory, which the first one that ends overwrites."""

    @contextmanager
    def lease(self, device):
        copies = {suffix: buffer.clone() for suffix, buffer in self.buffers.items()}
        lent = self.__dict__.setdefault(threading.get_ident(), copies)
        yield lent
        for buffer in lent.values():
            buffer.zero_()
        self.__dict__.pop(threading.get_ident(), None)


class StaysLeased(Kept):
    failed = False

    @contextmanager
    def lease(self, device):
        if self.failed:
            raise RuntimeError("it is leased")
        try:
            yield dict(self.buffers)
        except KeyError:
            self.failed = True
            raise


class OneThread(Kept):
    @contextmanager
    def lease(self, device):
        if self.placement.__dict__.setdefault("thread", threading.get_ident()) != threading.get_ident():
            raise RuntimeError("another thread")
        yield dict(self.buffers)


class CopiesHandles(Kept):
    def __deepcopy__(self, memo):
        return Kept(self.placement, self.name, self.buffers)


class CopiesItself(Sound):
    def __deepcopy__(self, memo):
        return copy.copy(self)


class InPlace(Sound):
    def hold(self, name, buffers, inner=None):
        handle = super().hold(name, buffers, inner)
        old = self.__dict__.setdefault("handles", {}).setdefault(name, handle)
        old.buffers = handle.buffers
        return old


class IgnoresTheNext(Sound):
    def hold(self, name, buffers, inner=None):
        return super().hold(name, buffers)


class Locks(Kept):
    """An export leaves a lock that only the end of the process removes."""

    def export(self):
        if os.getpid() != STARTED:
            (self.placement.directory / "lock").touch()
        return super().export()


class Locked(Sound):
    handle = Locks

    def hold(self, name, buffers, inner=None):
        if (self.directory / "lock").exists():
            raise RuntimeError("another process saves")
        return super().hold(name, buffers, inner)


class Silent(Sound):
    def describe(self):
        return ""


PLAN, BYTES, ORDER, ARRIVAL, TAKEN, RELEASED, NEST, FAILS, THREADS, COPIES, CHANGES, NEXT, KILLED, DESCRIBED = (
    "plan_takes_what_is_offered",
    "bytes_come_back",
    "bytes_do_not_depend_on_the_order_of_leases",
    "bytes_do_not_depend_on_the_order_of_arrival",
    "memory_that_it_takes_over_is_released",
    "memory_is_released_with_the_placement",
    "leases_nest",
    "a_lease_that_fails_leaves_the_weight_usable",
    "leases_of_several_threads_do_not_disturb_each_other",
    "a_copy_of_a_module_borrows_the_same_bytes",
    "a_weight_that_changes_gets_new_bytes",
    "a_placement_after_it_gets_the_bytes_or_is_refused",
    "a_save_that_is_killed_does_no_harm",
    "description_is_one_line",
)
EVERY_LEASE = {BYTES, ORDER, ARRIVAL, NEST, FAILS, THREADS, CHANGES, KILLED, RELEASED}
MUTANTS = {
    TakesMore: {PLAN},
    LeavesMore: {PLAN},
    of(Casts): {BYTES, KILLED},  # both export
    of(Forgets): EVERY_LEASE,
    of(InOrder): {ORDER, NEST},  # the latter has orders of its own
    ByArrival: {ARRIVAL},
    of(Shares): {TAKEN},
    of(Leaks): {RELEASED},
    of(FreesAtOnce): {NEST},
    of(StaysLeased): {FAILS},
    of(OneThread): {THREADS},
    of(CopiesHandles): {COPIES},
    CopiesItself: {COPIES},
    InPlace: {CHANGES},
    IgnoresTheNext: {NEXT},
    Locked: {KILLED},
    Silent: {DESCRIBED},
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_placement_breaks_its_law_and_no_other(broken_laws, mutant):
    suite = type("Suite", (PlacementSuite,), {"make": lambda self, directory: mutant(directory)})()
    assert broken_laws(suite) == MUTANTS[mutant]
    KEPT.clear()


def test_every_law_has_a_mutant():
    assert {f"test_{law}" for laws in MUTANTS.values() for law in laws} == PlacementSuite.laws().keys()
