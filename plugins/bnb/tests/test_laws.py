"""The laws of plugins, and of the codecs of this one."""

from arctic_plugins_bnb.codec import Int8Codec, NF4Codec

from arctic_plugins.testing import CodecSuite, PluginSuite


class TestPlugin(PluginSuite):
    plugin = "bnb"
    options = [{}, {"double_quant": True}, {"type": "int8"}]


class TestNF4(CodecSuite):
    codecs = [NF4Codec(), NF4Codec(double_quant=True)]
    tolerance = 0.1


class TestInt8(CodecSuite):
    codecs = [Int8Codec()]
    tolerance = 0.01
