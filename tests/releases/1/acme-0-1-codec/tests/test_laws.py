"""The laws of plugins and of codecs, and a story of a user."""

from arctic_plugins import Stack
from arctic_plugins.testing import CodecSuite, PluginSuite
from arctic_plugins_huggingface import load_model

from arctic_acme_0_1_codec.codec import Acme01CodecCodec


class TestPlugin(PluginSuite):
    plugin = "acme-0-1-codec"
    options = [{}, {"group_size": 32}]


class TestCodec(CodecSuite):
    codecs = [Acme01CodecCodec(), Acme01CodecCodec(group_size=32), Acme01CodecCodec(group_size=100)]
    tolerance = 0.01


def test_weights_take_a_quarter_of_the_memory(tiny_checkpoint):
    model, _ = load_model(tiny_checkpoint, Stack.from_dict({"acme-0-1-codec": {"include": ["**.mlp.*"]}}))
    layer = model.model.layers[0].mlp.up_proj
    size = sum(buffer.nbytes for buffer in layer.export("weight").values())
    assert size < layer.in_features * layer.out_features * 4 * 0.27
