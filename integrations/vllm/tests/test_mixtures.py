"""Experts in vLLM, and what checkpoints hold instead of buffers, as far as it goes without an engine."""

import json
from types import SimpleNamespace

import pytest
import torch
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_fp8.deepspeedfp import DeepSpeedFPConverter
from arctic_plugins_vllm import compat, register
from arctic_plugins_vllm.experts import EncodedExpertsMethod
from arctic_plugins_vllm.linear import EncodedLinearMethod
from arctic_plugins_vllm.loaders import convert, encode
from arctic_plugins_vllm.quantization import ON_THE_FLY, ArcticConfig
from torch import nn
from vllm.model_executor.layers.quantization import get_quantization_config

from arctic_plugins.errors import CheckpointError, CodecError, ConfigError
from arctic_plugins.frozen.experts import mix_experts

E, K, I = 4, 64, 96  # noqa: E741 - experts, hidden and intermediate size


class Experts(nn.Module):
    """Stands for vLLM's RoutedExperts: the attributes that the method reads, for one of ``tp_size`` processes."""

    ckpt_gate_proj_name, ckpt_down_proj_name, ckpt_up_proj_name = "w1", "w2", "w3"
    apply_router_weight_on_input = False
    swiglu_alpha = swiglu_beta = swiglu_limit = expert_map = None

    def __init__(self, up, down, *, reader=None, tp_size=1, tp_rank=0, local=tuple(range(E)), **config):
        super().__init__()
        self.local = list(local)
        self.activation = compat.MoEActivation.SILU
        self.moe_config = SimpleNamespace(
            has_bias=False,
            tp_shard_with_padding=False,
            is_act_and_mul=True,
            tp_size=tp_size,
            tp_rank=tp_rank,
            **dict.fromkeys(
                ("swiglu_limit", "swiglu_alpha", "swiglu_beta", "activation_situ_beta", "activation_situ_linear_beta")
            ),
        )
        vars(self.moe_config).update(config)
        if len(self.local) < E:
            self.expert_map = torch.tensor(
                [self.local.index(expert) if expert in self.local else -1 for expert in range(E)], dtype=torch.int32
            )
        self.method = EncodedExpertsMethod(up, down, self, "model.layers.0.mlp.experts", reader)
        self.method.create_weights(self, len(self.local), K, I // tp_size, torch.float32)

    def _map_global_expert_id_to_local_expert_id(self, expert):
        return self.local.index(expert) if expert in self.local else -1

    def load(self, weights, codec_of=None):
        for (expert, shard), weight in weights.items():
            leaf = "w2_weight" if shard == "w2" else "w13_weight"
            for suffix, buffer in ({"": weight} if codec_of is None else codec_of[leaf].encode(weight)).items():
                param = getattr(self, f"{leaf}{suffix}")
                param.weight_loader(
                    param=param,
                    loaded_weight=buffer,
                    weight_name=f"{leaf}{suffix}",
                    shard_id=shard,
                    expert_id=expert,
                    return_success=True,
                )
        self.method.process_weights_after_loading(self)


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (I, K), "w2": (K, I), "w3": (I, K)}
    return {
        (expert, shard): torch.randn(shape, generator=generator) / 8
        for expert in range(E)
        for shard, shape in shapes.items()
    }


def definition(weights, codec_of, x, weight, index):
    def matrix(expert, shard):
        codec = codec_of["w2_weight" if shard == "w2" else "w13_weight"]
        plain = weights[expert, shard]
        return codec.decode(codec.encode(plain), tuple(plain.shape), torch.float32)

    def product(shards):
        def run(rows, counts):
            parts = rows.split(counts.tolist())
            return torch.cat(
                [part @ torch.cat([matrix(expert, shard) for shard in shards]).T for expert, part in enumerate(parts)]
            )

        return run

    def act(rows):
        gate, up = rows.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    up, down = product(["w1", "w3"]), product(["w2"])
    return mix_experts(x, index, weight, E, lambda rows, counts: down(act(up(rows, counts)), counts))


UP, DOWN = FP8Codec(bits=6, group_size=32), FP8Codec(bits=12, group_size=32)
CODECS = {"w13_weight": UP, "w2_weight": DOWN}


def tokens():
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(7)])
    return torch.randn(7, K, generator=generator), torch.rand(7, 2, generator=generator), index.int()


@pytest.mark.parametrize("reader", [None, encode], ids=["encoded", "plain"])
def test_whole_split_or_shared_out_the_experts_compute_the_same(reader):
    x, weight, index = tokens()
    expected = definition(weights(), CODECS, x, weight, index.long())
    channel = {"w13_weight": FP8Codec(), "w2_weight": FP8Codec()}
    whole = [Experts(UP, DOWN, reader=reader)]
    halves = [Experts(*channel.values(), reader=reader, tp_size=2, tp_rank=rank) for rank in (0, 1)]
    shared = [Experts(UP, DOWN, reader=reader, local=(rank, rank + 2)) for rank in (0, 1)]
    for layers, codec_of in ((whole, CODECS), (halves, channel), (shared, CODECS)):
        for layer in layers:
            layer.load(weights(), None if reader else codec_of)
        found = sum(layer.method.apply(layer, x, weight, index) for layer in layers)
        wanted = expected if codec_of is CODECS else definition(weights(), channel, x, weight, index.long())
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_compiled_it_is_one_operator_that_gives_the_same():
    layer, (x, weight, index) = Experts(UP, DOWN), tokens()
    layer.load(weights(), CODECS)
    compiled = torch.compile(lambda *inputs: layer.method.apply(layer, *inputs), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, index), layer.method.apply(layer, x, weight, index))


def test_splits_along_k_fall_on_group_borders():
    with pytest.raises(
        ConfigError,
        match=r"experts would be split along its inputs into parts of 48; expected a multiple of the group size 32",
    ):
        Experts(UP, DOWN, tp_size=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"has_bias": True}, "is encoded and has biases"),
        ({"tp_shard_with_padding": True}, "padded tensor parallel shards"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Experts(UP, DOWN, **change)


def test_an_expert_that_never_comes_is_an_error():
    some = weights()
    del some[2, "w3"]
    with pytest.raises(CheckpointError, match=r"experts\.w13_weight is missing from the checkpoint \(7 of 8 parts"):
        Experts(UP, DOWN).load(some, CODECS)


def test_an_expert_of_another_shape_is_an_error():
    with pytest.raises(
        CheckpointError, match=r"w2_weight.*expert 0.* in the checkpoint; expected torch\.uint8 \(64, 3, 48\)"
    ):
        Experts(UP, DOWN).load({(0, "w2"): torch.randn(K - 1, I)}, CODECS)


CONFIG = {
    "quant_method": "arctic",
    "format": 1,
    "codecs": {"a": {"type": "fp8", "bits": 8}, "b": {"type": "fp8", "bits": 12}},
    "modules": {"*.experts.*.w1": "a", "*.experts.*.w2": "b", "*.experts.*.w3": "a"},
}


def test_the_two_weights_of_experts_may_have_two_codecs():
    layer = SimpleNamespace(ckpt_gate_proj_name="w1", ckpt_down_proj_name="w2", ckpt_up_proj_name="w3")
    assert ArcticConfig.from_config(CONFIG).experts_codecs(layer, "mlp.experts") == (FP8Codec(), FP8Codec(bits=12))
    assert ArcticConfig.from_config(CONFIG).experts_codecs(layer, "other.layer.experts") is None
    for modules, message in (
        ({"*.experts.*.w1": "a", "*.experts.*.w3": "b"}, r"different codecs \(mlp\.experts\.0\.w1.*w3"),
        ({"*.experts.*.w1": "a", "*.experts.*.w3": "a"}, "only one weight of mlp.experts is encoded"),
    ):
        with pytest.raises(CheckpointError, match=message):
            ArcticConfig.from_config({**CONFIG, "modules": modules}).experts_codecs(layer, "mlp.experts")


class Linear(nn.Module):
    """Stands for vLLM's linear layers: its loader copies."""

    def __init__(self, codec, n, k, reader):
        super().__init__()
        self.method = EncodedLinearMethod(codec, "layer", reader)
        self.method.create_weights(self, k, [n], k, n, torch.float32, weight_loader=self.weight_loader)

    def weight_loader(self, param, loaded_weight):
        param.data.copy_(loaded_weight)


def test_a_plain_weight_is_encoded_as_it_comes():
    codec, weight, x = FP8Codec(group_size=32), torch.randn(8, K), torch.randn(3, K)
    layer = Linear(codec, 8, K, encode)
    layer.weight.weight_loader(layer.weight, weight)
    layer.method.process_weights_after_loading(layer)
    torch.testing.assert_close(layer.method.apply(layer, x), codec.linear(x, codec.encode(weight), (8, K)))
    weight[3, 5] = float("nan")
    with pytest.raises(CodecError, match=r"layer\.weight: the weight holds NaN"):
        layer.weight.weight_loader(layer.weight, weight)
    with pytest.raises(CheckpointError, match=r"layer\.weight: a weight to encode is torch\.uint8 \(8, 1, 64\)"):
        layer.weight.weight_loader(layer.weight, torch.zeros(8, 1, 64, dtype=torch.uint8))


def test_weights_that_are_plain_in_another_format_are_encoded():
    codec, weight = FP8Codec(group_size=64), torch.randn(8, K)
    layer = Linear(codec, 8, K, convert(DeepSpeedFPConverter({"bits": 8})))
    layer.weight.weight_loader(layer.weight, weight)
    for suffix, buffer in codec.encode(weight).items():
        assert torch.equal(getattr(layer, f"weight{suffix}"), buffer)


def test_deepspeedfp_is_a_method_again(tmp_path):
    register()
    found = get_quantization_config("deepspeedfp")
    assert (found.get_name(), found.get_config_filenames()) == (
        "deepspeedfp",
        ["quant_config.json", "quantize_config.json"],
    )
    with pytest.raises(CheckpointError, match="quantized with bits 4"):
        found.from_config({"bits": 4})
    config = found.from_config(json.loads('{"quant_method": "deepspeedfp", "bits": 6, "group_size": 512}'))
    layer = SimpleNamespace(moe_config=SimpleNamespace(intermediate_size=1024, hidden_dim=2816))
    assert config.experts_codecs(layer, "experts") == (
        FP8Codec(bits=6, group_size=256),
        FP8Codec(bits=6, group_size=512),
    )
    layer.moe_config.hidden_dim = 33
    assert config.experts_codecs(layer, "experts") is None


def test_on_the_fly_is_for_overrides_only():
    assert ArcticConfig.from_config({**CONFIG, ON_THE_FLY: True}).reader is encode
    assert ArcticConfig.from_config(CONFIG).reader is None
