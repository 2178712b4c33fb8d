"""The laws of plugins, and of the type that this one registers."""

from arctic_plugins.testing import PluginSuite, RopeTypeSuite


class TestPlugin(PluginSuite):
    plugin = "rope"
    options = [{"type": "yarn", "factor": 2.0}, {"type": "ntk", "factor": 4.0}]


class TestNtk(RopeTypeSuite):
    rope_type = "ntk"
    parameters = [{"factor": 4.0}, {"factor": 4.0, "mixed_b": 0.625}]
