"""Each law of dispatches finds the dispatches that break it, and only those."""

import re

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
    "rank is 1 of 1": ({"rank": 1}, {"rank_is_one_of_the_processes"}),
    "local.. omits an expert": (
        {"local": lambda self, num_experts: slice(1, num_experts)},
        {"every_expert_is_in_one_process", PIECES, ROWS, ONE},
    ),
    "contains an empty piece": ({"pieces": lambda self, num_experts: [num_experts, 0]}, {PIECES}),
    "an expert that was not chosen": (
        {"apply_capacity": lambda self, index, weights, num_experts: (index * 0, weights)},
        {CAPACITY},
    ),
    "changes the shape of the index": (
        {"apply_capacity": lambda self, index, weights, num_experts: (index[:, :1], weights)},
        {CAPACITY},
    ),
    "one object for every copy": ({"__deepcopy__": lambda self, memo: Here()}, {"one_object_serves_every_copy"}),
    "reached the wrong expert or the wrong place": (with_tokens(Reversed), {ROWS, ONE}),
    "gradients of rows took another way": (with_tokens(Detached), {ROWS, ONE}),
}


@pytest.mark.parametrize("message", MUTANTS)
def test_a_broken_dispatch_breaks_its_law_and_no_other(message):
    wrong, laws = MUTANTS[message]
    suite, broken = DispatchSuite(), {}
    for name, law in suite.laws().items():
        try:
            law(suite, dispatch=type("Wrong", (Here,), wrong)())
        except pytest.skip.Exception:
            continue
        except Exception as error:
            broken[name.removeprefix("test_")] = str(error)
    assert broken.keys() == laws
    assert any(re.search(message, found) for found in broken.values())
