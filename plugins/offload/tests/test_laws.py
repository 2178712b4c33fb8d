"""The laws of plugins."""

from arctic_plugins.testing import PluginSuite


class TestPlugin(PluginSuite):
    plugin = "offload"
    options = [{}, {"to": "disk", "ratio": 0.6}]
