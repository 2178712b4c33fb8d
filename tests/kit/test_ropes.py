"""Each law of RoPE types finds a type that breaks it."""

import pytest
import torch
from arctic_plugins_huggingface import register
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from arctic_plugins.registry import Registry
from arctic_plugins.testing import RopeTypeSuite

PARAMETERS = {"factor": 4.0}


class Suite(RopeTypeSuite):
    rope_type = "ntk"  # one that is registered with transformers, in whose place others are tried
    parameters = [PARAMETERS]


def plain(parameters, dim):
    return 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def sound(parameters, dim):
    return plain(parameters, dim) / parameters["factor"], 1.0


def wide(parameters, dim):
    return sound(parameters, dim)[0].double(), 1.0


def rising(parameters, dim):
    return sound(parameters, dim)[0].flip(0), 1.0


def growing(parameters, dim):
    return plain(parameters, dim) * parameters["factor"], 1.0


def without_factor(parameters, dim):
    return plain(parameters, dim), 1.0


def one_is_scaled(parameters, dim):
    return plain(parameters, dim) / (1 + parameters["factor"]), 1.0


def impure(parameters, dim):
    parameters["seen"] = True
    return sound(parameters, dim)


FALL, HIGHER, ONE, PURE, TURNS = (
    "frequencies_are_positive_and_fall",
    "no_frequency_is_higher_than_without_scaling",
    "a_factor_of_one_changes_no_frequency",
    "it_is_a_pure_function",
    "transformers_turns_by_these_frequencies",
)
MUTANTS = {
    wide: {FALL, ONE, TURNS},
    rising: {FALL, HIGHER, ONE},
    growing: {HIGHER},
    without_factor: {HIGHER},
    one_is_scaled: {ONE},
    impure: {PURE},
}


@pytest.mark.parametrize("function", [sound, *MUTANTS])
def test_a_broken_type_breaks_its_law_and_no_other(broken_laws, monkeypatch, function):
    register()
    monkeypatch.setattr(Registry, "load_rope_type", lambda self, name: function)
    assert broken_laws(Suite(), parameters=PARAMETERS) == MUTANTS.get(function, set())


def test_a_host_that_computes_otherwise(broken_laws, monkeypatch):
    register()
    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "ntk", ROPE_INIT_FUNCTIONS["linear"])
    assert broken_laws(Suite(), parameters=PARAMETERS) == {TURNS}


def test_every_law_has_a_mutant():
    assert {f"test_{law}" for laws in (*MUTANTS.values(), {TURNS}) for law in laws} == RopeTypeSuite.laws().keys()
