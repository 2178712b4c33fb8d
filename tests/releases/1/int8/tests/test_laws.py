"""The laws of plugins, and of the codec and the placement of this one."""

from arctic_test_int8.codec import Int8Codec, Spool

from arctic_plugins.testing import CodecSuite, PlacementSuite, PluginSuite


class TestPlugin(PluginSuite):
    plugin = "int8"


class TestCodec(CodecSuite):
    codecs = [Int8Codec()]
    tolerance = 0.01


class TestSpool(PlacementSuite):
    def make(self, directory):
        return Spool(directory)
