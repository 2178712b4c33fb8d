"""The check for dispatches finds what is wrong with one."""

import pytest

from arctic_plugins.frozen import ExpertsDispatch, LocalTokens
from arctic_plugins.testing import check_dispatch


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


def test_a_sound_one_passes():
    check_dispatch(Here())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 1}, "rank is 1 of 1"),
        ({"local": lambda self, num_experts: slice(1, num_experts)}, "pieces.. do not add up to the experts"),
        ({"pieces": lambda self, num_experts: [num_experts, 0]}, "contains an empty piece"),
        (
            {"apply_capacity": lambda self, index, weights, num_experts: (index * 0, weights)},
            "an expert that was not chosen",
        ),
        (
            {"apply_capacity": lambda self, index, weights, num_experts: (index[:, :1], weights)},
            "changes the shape of the index",
        ),
        ({"__deepcopy__": lambda self, memo: Here()}, "one object for every copy"),
        (with_tokens(Reversed), "reached the wrong expert or the wrong place"),
        (with_tokens(Detached), "gradients of rows took another way"),
    ],
)
def test_what_is_wrong_is_said(wrong, message):
    with pytest.raises(AssertionError, match=message):
        check_dispatch(type("Wrong", (Here,), wrong)())
