"""The method `arctic` in vLLM, as far as it goes without an engine."""

import pytest
import torch
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_vllm import quantization, register
from arctic_plugins_vllm.embedding import StoredEmbeddingMethod
from arctic_plugins_vllm.quantization import ArcticConfig, EncodedLinearMethod
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from arctic_plugins.errors import CheckpointError, ConfigError, PluginNotFoundError
from arctic_plugins.frozen import Codec
from arctic_plugins.testing import run_python

CONFIG = {
    "quant_method": "arctic",
    "format": 1,
    "codecs": {"fp8": {"type": "fp8", "bits": 8, "group_size": 32}},
    "modules": {"model.layers.*.self_attn.q_proj": "fp8", "model.layers.*.mlp.up_proj": "fp8", "lm_head": "fp8"},
}


def test_importing_the_entry_point_loads_nothing_heavy():
    code = "import sys, arctic_plugins_vllm; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"


def test_registering_twice_is_registering_once():
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    register()
    assert get_quantization_config("arctic") is ArcticConfig


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": 2}, CheckpointError, "format 2; expected at most 1; upgrade"),
        (
            {"codecs": {"fp8": {"type": "fp3"}}},
            PluginNotFoundError,
            "no installed plugin provides the checkpoint's codec type 'fp3'",
        ),
        ({"codecs": {}}, CheckpointError, r"names the codecs \['fp8'\]"),
    ],
)
def test_configs_that_cannot_be_served(change, error, message):
    with pytest.raises(error, match=message):
        ArcticConfig.from_config({**CONFIG, **change})


def test_fused_modules_need_one_codec():
    config = ArcticConfig.from_config(CONFIG)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with pytest.raises(
        CheckpointError,
        match=r"fuses modules with different codecs \(model\.layers\.0\.self_attn\.q_proj: FP8Codec.*k_proj: None",
    ):
        config.get_quant_method(nn.Module(), "model.layers.0.self_attn.qkv_proj")


class Layer(nn.Module):
    """Stands for vLLM's linear layers, of which the method uses only that they hold parameters."""

    def __init__(self, codec, n, k, *, k_full=None, parts=1):
        super().__init__()
        self.method = EncodedLinearMethod(codec, "layer")
        self.calls = []
        self.method.create_weights(
            self, k, [n // parts] * parts, k_full or k, n, torch.float32, weight_loader=self.weight_loader
        )

    def weight_loader(self, param, loaded_weight, *shard):
        self.calls.append(shard)


@pytest.mark.parametrize("codec", [FP8Codec(), FP8Codec(group_size=32)], ids=str)
def test_computes_what_the_codec_computes(codec):
    weight, x, bias = torch.randn(8, 80), torch.randn(3, 80), torch.randn(8)
    layer = Layer(codec, 8, 80)
    for suffix, buffer in codec.encode(weight).items():
        getattr(layer, f"weight{suffix}").data.copy_(buffer)
    expected = x @ codec.decode(codec.encode(weight), (8, 80), torch.float32).T + bias
    torch.testing.assert_close(layer.method.apply(layer, x, bias), expected)


def test_splits_along_k_fall_on_group_borders():
    Layer(FP8Codec(), 8, 50, k_full=100)
    Layer(FP8Codec(group_size=32), 8, 64, k_full=128)
    with pytest.raises(
        ConfigError, match="split along its inputs into parts of 50; expected a multiple of the group size 32"
    ):
        Layer(FP8Codec(group_size=32), 8, 50, k_full=100)


def test_a_part_that_never_comes_is_an_error():
    layer = Layer(FP8Codec(), 8, 64, parts=2)
    codes, scale = FP8Codec().encode(torch.randn(4, 64)).values()
    for shard in (0, 1):
        layer.weight.weight_loader(layer.weight, codes, shard)
    layer.weight_scale.weight_loader(layer.weight_scale, scale, 1)
    assert layer.calls == [(0,), (1,), (1,)]
    with pytest.raises(CheckpointError, match=r"layer\.weight_scale is missing from the checkpoint \(1 of 2 parts"):
        layer.method.process_weights_after_loading(layer)


def test_a_layer_can_be_loaded_again():
    layer = Layer(FP8Codec(), 8, 64)
    for _ in range(2):
        for suffix, buffer in FP8Codec().encode(torch.randn(8, 64)).items():
            param = getattr(layer, f"weight{suffix}")
            assert (
                param.weight_loader.__name__ != "online_process_loader"
            )  # vLLM's reload reads the name, and that the loader is a method
            assert param.weight_loader.__self__ is layer
            param.weight_loader(param, buffer)
        layer.method.process_weights_after_loading(layer)
    with pytest.raises(CheckpointError, match="0 of 1 parts"):
        layer.method.process_weights_after_loading(layer)


class Embedding(VocabParallelEmbedding):
    """Stands for vLLM's embeddings and heads, which need process groups to be made."""

    def __init__(self):
        nn.Module.__init__(self)


@pytest.mark.parametrize(
    ("computes", "stored", "compiled", "kept"),
    [
        ("float32", "bfloat16", True, True),
        ("float32", "bfloat16", False, False),
        ("bfloat16", "bfloat16", True, False),
        ("float32", "float32", True, False),
    ],
)
def test_heads_keep_the_checkpoints_dtype_where_products_are_wider(monkeypatch, computes, stored, compiled, kept):
    if not compiled:
        monkeypatch.setattr("arctic_plugins_fp8.kernels.ops.load", lambda: "")
    monkeypatch.setattr(quantization, "model_dtype", lambda: getattr(torch, computes))
    monkeypatch.setattr(quantization, "stored_dtype", lambda: getattr(torch, stored))
    config, embedding, head = ArcticConfig.from_config({**CONFIG, "modules": {}}), Embedding(), Embedding()
    config.checked = True
    method = config.get_quant_method(embedding, "model.embed_tokens")
    assert isinstance(method, StoredEmbeddingMethod) == kept
    if not kept:
        return
    for layer in (embedding, head):
        method.create_weights(layer, 80, [50], 80, 50, params_dtype=torch.float32, weight_loader=None)
        assert layer.weight.dtype == torch.bfloat16
    embedding.weight.data.copy_(weight := torch.randn(50, 80).bfloat16())
    method.tie_weights(head, embedding)
    method.process_weights_after_loading(head)
    x, bias, ids = torch.randn(3, 80), torch.randn(50), torch.tensor([[4, 0], [49, 4]])
    torch.testing.assert_close(method.apply(head, x), x @ weight.float().T)
    torch.testing.assert_close(method.apply(head, x, bias), x @ weight.float().T + bias)
    torch.testing.assert_close(method.embedding(embedding, ids), weight.float()[ids])


class PlainCodec(FP8Codec):
    """A codec without a linear of its own."""

    linear = Codec.linear


@pytest.mark.parametrize(
    ("codec", "operator"),
    [
        (FP8Codec(group_size=32), "arctic_fp8.linear.default"),
        (PlainCodec(group_size=32), "arctic_plugins.codec_linear"),
    ],
)
def test_compiled_it_is_one_operator_that_gives_the_same(codec, operator):
    weight, x = torch.randn(8, 80), torch.randn(3, 80)
    layer = Layer(codec, 8, 80)
    for suffix, buffer in codec.encode(weight).items():
        getattr(layer, f"weight{suffix}").data.copy_(buffer)
    found = []

    def backend(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(lambda x: layer.method.apply(layer, x), backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer.method.apply(layer, x))
    assert found == [operator]


def test_patterns_follow_the_names_that_vllm_gives():
    from vllm.model_executor.models.utils import WeightsMapper

    config = ArcticConfig.from_config(CONFIG)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.codecs.codec_of("language_model.model.layers.3.mlp.up_proj") == FP8Codec(group_size=32)
    assert config.codecs.codec_of("model.layers.3.mlp.up_proj") is None


def test_a_tensor_of_another_shape_or_dtype_is_an_error():
    layer = Layer(FP8Codec(), 8, 64)
    with pytest.raises(
        CheckpointError,
        match=r"layer\.weight is torch\.float32 \(8, 64\) in the checkpoint; expected torch\.uint8 \(rows, 1, 64\)",
    ):
        layer.weight.weight_loader(layer.weight, torch.randn(8, 64))
