"""The laws of plugins."""

from arctic_plugins.testing import PluginSuite


class TestPlugin(PluginSuite):
    plugin = "longseq"
    options = [{}, {"loss_tile": 7, "tiled_mlp": True, "mlp_tile": 13, "recompute": 0.5}]
