"""Each law of dispatches finds the dispatches that break it, and only those."""

import pytest

from arctic_plugins.frozen import ExpertsDispatch, LocalTokens
from arctic_plugins.testing import DispatchSuite


class Here(ExpertsDispatch):
    """One process that holds all experts, in two pieces."""

    size, rank = 1, 0

    def local(self, num_experts):
        return slice(0, num_experts)

    def pieces(self, num_experts):
        return [3, num_experts - 3]

    def dispatch(self, rows_RK, counts):
        rows = rows_RK.split([int(own.sum()) for own in counts])
        return [LocalTokens(own, number) for own, number in zip(rows, counts, strict=True)]

    def sum_over_copies(self, tensor): ...

    def sum_over_parts(self, tensor): ...

    def gather(self, local):
        return [local]


class Reversed(LocalTokens):
    def combined(self):
        return self.rows.flip(0)


class Detached(LocalTokens):
    def receive(self):
        return self.rows.detach(), self.counts


def with_tokens(kind):
    def dispatch(self, rows_RK, counts):
        return [kind(stay.rows, stay.counts) for stay in Here.dispatch(self, rows_RK, counts)]

    return {"dispatch": dispatch}


class TestSound(DispatchSuite):
    dispatches = [Here()]


ROWS, ONE, PIECES, CAPACITY = (
    "rows_and_gradients_reach_their_experts",
    "all_rows_may_go_to_one_expert",
    "pieces_add_up_and_are_the_same_in_all_processes",
    "capacity_only_drops",
)
MUTANTS = {
    "rank": ({"rank": 1}, {"rank_is_one_of_the_processes"}),
    "no first expert": (
        {"local": lambda self, num_experts: slice(1, num_experts)},
        {"every_expert_is_in_one_process", PIECES, ROWS, ONE},
    ),
    "empty piece": ({"pieces": lambda self, num_experts: [num_experts, 0]}, {PIECES}),
    "another expert": (
        {"apply_capacity": lambda self, index, weights, num_experts: (index * 0, weights)},
        {CAPACITY},
    ),
    "shape of the index": (
        {"apply_capacity": lambda self, index, weights, num_experts: (index[:, :1], weights)},
        {CAPACITY},
    ),
    "copy": ({"__deepcopy__": lambda self, memo: Here()}, {"one_object_serves_every_copy"}),
    "wrong place": (with_tokens(Reversed), {ROWS, ONE}),
    "no gradients": (with_tokens(Detached), {ROWS, ONE}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_dispatch_breaks_its_law_and_no_other(broken_laws, name):
    wrong, laws = MUTANTS[name]
    assert broken_laws(DispatchSuite(), dispatch=type("Wrong", (Here,), wrong)()) == laws


class Spread(Here):
    """The first of two processes that hold one copy of the experts, of which there are two; only sums and gathers."""

    size = 2

    def sum_over_copies(self, tensor):
        tensor.mul_(2)

    def gather(self, local):
        return [local, local + 1]


SUMS, GATHERED = "sums_are_over_copies", "parts_are_gathered_in_the_first_process"
SPREAD = {
    "sound": ({}, set()),
    "no sum": ({"sum_over_copies": Here.sum_over_copies}, {SUMS}),
    "one part": ({"gather": Here.gather}, {GATHERED}),
    "order": ({"gather": lambda self, local: [local + 1, local]}, {GATHERED}),
}


@pytest.mark.parametrize("name", SPREAD)
def test_a_broken_dispatch_over_processes_breaks_its_law(broken_laws, monkeypatch, name):
    wrong, laws = SPREAD[name]
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    dispatch = type("Wrong", (Spread,), wrong)()
    found = {law for each in (SUMS, GATHERED) for law in broken_laws(DispatchSuite(), only=each, dispatch=dispatch)}
    assert found == laws


def test_every_law_has_a_mutant():
    of_all = {law for _, laws in (*MUTANTS.values(), *SPREAD.values()) for law in laws}
    assert {f"test_{law}" for law in of_all} == DispatchSuite.laws().keys()
