"""The laws of plugins."""

from arctic_plugins.testing import PluginSuite


class TestPlugin(PluginSuite):
    plugin = "speculate"
    options = [{}, {"method": "ngram", "prompt_lookup_max": 4}, {"method": "draft", "tokens": 2}]
