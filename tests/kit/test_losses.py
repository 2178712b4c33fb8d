"""Each law of losses finds a plugin that breaks it."""

import pytest

from arctic_plugins.testing import LossSuite

SOURCE = """
from arctic_plugins import Plugin, hookimpl

class plugin(Plugin):
    name = "kit"
    slots = frozenset({{"loss"}})

    @hookimpl
    def hf_transform_model(self, model):
        stock = model.loss_function
        model.loss_function = lambda logits, labels, **kwargs: {loss}
        model.lm_head.register_forward_hook(lambda self, inputs, logits: logits * (1 + ({changed})))
        return model
"""
LOSS, LOGITS = "loss_and_gradients_are_those_of_all_logits", "logits_are_there_without_labels_and_in_evaluation"
MUTANTS = {
    "sound": ("stock(logits, labels, **kwargs)", "0", set()),
    "mean": ("stock(logits, labels, **{**kwargs, 'num_items_in_batch': None})", "0", {LOSS}),
    "ignored labels": ("stock(logits, labels.clamp(min=0), **kwargs)", "0", {LOSS}),
    "gradient": ("stock(2 * logits - logits.detach(), labels, **kwargs)", "0", {LOSS}),
    "logits": ("stock(logits, labels, **kwargs)", "not self.training", {LOGITS}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_loss_breaks_its_law_and_no_other(broken_laws, install_plugin, tiny_models, name):
    loss, changed, laws = MUTANTS[name]
    install_plugin("kit", SOURCE.format(loss=loss, changed=changed))
    suite = type("Suite", (LossSuite,), {"plugin": "kit"})()
    given = {"options": {}, "model": ("llama", {}), "tiny_models": tiny_models}
    assert broken_laws(suite, **given) == laws


def test_every_law_has_a_mutant():
    assert {f"test_{law}" for _, _, laws in MUTANTS.values() for law in laws} == LossSuite.laws().keys()
