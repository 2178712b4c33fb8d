"""The laws of plugins and of losses, and a story of a user."""

import torch
from arctic_plugins import Stack
from arctic_plugins.testing import LossSuite, PluginSuite
from arctic_plugins_huggingface import load_model


class TestPlugin(PluginSuite):
    plugin = "acme-0-1-loss"
    options = [{}, {"tile": 7}]


class TestLoss(LossSuite):
    plugin = "acme-0-1-loss"
    options = [{}, {"tile": 1}, {"tile": 7}]


def test_a_batch_without_labels_that_count_has_no_gradient(tiny_checkpoint):
    model, _ = load_model(tiny_checkpoint, Stack.from_dict({"acme-0-1-loss": {}}))
    ids = torch.arange(10, 30)[None]
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=7).loss
    loss.backward()
    assert loss == 0
    assert not model.lm_head.weight.grad.any()
