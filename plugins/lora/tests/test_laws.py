"""The laws of plugins."""

from arctic_plugins.testing import PluginSuite


class TestPlugin(PluginSuite):
    plugin = "lora"
    options = [{"r": 4}, {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}]
