"""The laws of plugins and of RoPE types, and a story of a user."""

from arctic_plugins import Stack
from arctic_plugins.testing import PluginSuite, RopeTypeSuite
from arctic_plugins_huggingface import load_model


class TestPlugin(PluginSuite):
    plugin = "acme-0-1-rope"


class TestRopeType(RopeTypeSuite):
    rope_type = "acme-0-1-rope"
    parameters = [{"factor": 4.0}, {"factor": 1.5}]


def test_a_recipe_gives_a_model_four_times_the_context(tiny_checkpoint):
    model, _ = load_model(tiny_checkpoint, Stack.from_dict({"rope": {"type": "acme-0-1-rope", "factor": 4.0}}))
    assert model.config.rope_parameters["rope_type"] == "acme-0-1-rope"
    assert model.config.rope_parameters["factor"] == 4.0
