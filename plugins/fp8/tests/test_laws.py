"""The laws of plugins."""

from arctic_plugins.testing import PluginSuite


class TestPlugin(PluginSuite):
    plugin = "fp8"
    options = [{}, {"bits": 6, "group_size": 32}, {"bits": 12}]
