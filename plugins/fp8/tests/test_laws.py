"""The laws of plugins, and of the codecs of this one."""

from arctic_plugins_fp8.codec import FP8Codec

from arctic_plugins.testing import CodecSuite, PluginSuite


class TestPlugin(PluginSuite):
    plugin = "fp8"
    options = [{}, {"bits": 6, "group_size": 32}, {"bits": 12}]


class Test8Bits(CodecSuite):
    codecs = [*(FP8Codec(group_size=group) for group in ("channel", 32, 100, 128)), FP8Codec(scale="mse")]
    tolerance = 0.03


class Test6Bits(CodecSuite):
    codecs = [
        *(FP8Codec(bits=6, group_size=group) for group in ("channel", 32, 100, 128)),
        FP8Codec(bits=6, group_size=32, scale="mse"),
    ]
    tolerance = 0.06


class Test12Bits(CodecSuite):
    codecs = [FP8Codec(bits=12, group_size=group) for group in ("channel", 32, 46, 512)]
    tolerance = 0.002


class TestRoundedActivations(CodecSuite):
    codecs = [FP8Codec(activations="fp8")]
    tolerance = activation_tolerance = 0.03
