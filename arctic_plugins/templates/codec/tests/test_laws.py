"""The laws of plugins and of codecs, and a story of a user."""

from arctic_plugins import Stack
from arctic_plugins.testing import CodecSuite, PluginSuite
from arctic_plugins_huggingface import load_model

from arctic_acme.codec import AcmeCodec


class TestPlugin(PluginSuite):
    plugin = "acme"
    options = [{}, {"group_size": 32}]


class TestCodec(CodecSuite):
    codecs = [AcmeCodec(), AcmeCodec(group_size=32), AcmeCodec(group_size=100)]
    tolerance = 0.01


def test_weights_take_a_quarter_of_the_memory(tiny_checkpoint):
    model, _ = load_model(tiny_checkpoint, Stack.from_dict({"acme": {"include": ["**.mlp.*"]}}))
    layer = model.model.layers[0].mlp.up_proj
    size = sum(buffer.nbytes for buffer in layer.export("weight").values())
    assert size < layer.in_features * layer.out_features * 4 * 0.27
