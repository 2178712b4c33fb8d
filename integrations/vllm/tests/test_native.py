"""Layers handed to vLLM's own kernels, against vLLM's loader for the exported checkpoint: bit by bit, on CPU.

vLLM has no kernel on CPU for weights of which the activations are not rounded, and none for experts; for these, tests
add a kernel to vLLM's list, or name one that only a GPU could run. Nothing here ran on a GPU.
"""

import shutil

import pytest
import torch
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_huggingface import load_model, save_checkpoint
from arctic_plugins_huggingface.checkpoints.export import export_checkpoint
from arctic_plugins_vllm import native, register
from arctic_plugins_vllm.compat import DefaultModelLoader
from arctic_plugins_vllm.experts import EncodedExpertsMethod
from arctic_plugins_vllm.linear import EncodedLinearMethod
from arctic_plugins_vllm.probe import check_worker
from arctic_plugins_vllm.quantization import ArcticConfig
from arctic_plugins_vllm.sharding import built_as_rank, shard_checkpoint
from safetensors.torch import load_file, save_file
from vllm.logger import _print_info_once
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as moe,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.platforms import current_platform

from arctic_plugins import Stack
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.frozen import take_scratch
from arctic_plugins.provenance import FILE_NAME
from arctic_plugins.testing import MIXTURES, tiny_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares vLLM's choice on CPU")

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
QKV, DOWN, EXPERTS = (
    "model.layers.1.self_attn.qkv_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.1.block_sparse_moe.experts.routed_experts",
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(model type, activations) -> (encoded, exported)."""
    directory, made = tmp_path_factory.mktemp("checkpoints"), {}
    register()
    for model_type, activations in (("llama", "full"), ("llama", "fp8"), ("mixtral", "fp8")):
        config = MIXTURES["mixtral"][1] if model_type == "mixtral" else {"attention_bias": True}
        path, stack = directory / model_type / activations, Stack.from_dict({"fp8": {"activations": activations}})
        plain = tiny_model(path / "plain", model_type, **config, **SIZES)
        encoded = save_checkpoint(*load_model(plain, stack), path / "encoded", stack)
        exported = export_checkpoint(encoded, path / "exported", "compressed-tensors")
        made[model_type, activations] = encoded, exported
    return made


class WeightOnly(kernels.FP8ScaledMMLinearKernel):
    """Stands for Marlin: a product with unrounded activations."""

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    @classmethod
    def can_implement(cls, config):
        return True, None

    def apply_weights(self, layer, x, bias=None):
        y = x @ (layer.weight.float() * layer.weight_scale.view(1, -1)).to(x.dtype)
        return y if bias is None else y + bias

    def apply_scaled_mm(self, **_):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def kernels_here(monkeypatch):
    """What a GPU has and this machine does not; and vLLM's kernels are asked for."""
    monkeypatch.setenv(native.VARIABLE, "native")
    monkeypatch.setitem(kernels._POSSIBLE_WFP8A16_KERNELS, current_platform._enum, [WeightOnly])
    monkeypatch.setattr(moe, "select_fp8_moe_backend", lambda **_: (Fp8MoeBackend.TRITON, TritonExperts))


@pytest.fixture
def log(monkeypatch):
    """Lines of the log, whatever level and handlers vLLM's loggers have."""
    _print_info_once.cache_clear()
    lines = []
    for name in ("info", "warning"):
        monkeypatch.setattr(native.logger, name, lambda line, *values, **_: lines.append(line % values))
    return lines


def load(checkpoint, rank=0, size=1):
    with built_as_rank(checkpoint, rank, size) as (model, config):
        DefaultModelLoader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        return model.eval(), config


def encoded_layers(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), EncodedLinearMethod | EncodedExpertsMethod)
    }


def assert_same(model, expected):
    """Every parameter is the same, to the bit and to the stride."""
    found, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        own = found[name]
        assert (own.dtype, own.shape, own.stride()) == (parameter.dtype, parameter.shape, parameter.stride()), name
        as_bits = torch.uint8 if own.dtype == torch.float8_e4m3fn else own.dtype
        assert torch.equal(own.view(as_bits), parameter.view(as_bits)), name


LINEAR = {"full": "CompressedTensorsW8A16Fp8 with WeightOnly", "fp8": "CompressedTensorsW8A8Fp8 with ChannelWiseTorch"}


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("activations", ["full", "fp8"])
def test_layers_hold_what_vllm_makes_of_the_exported_checkpoint(checkpoints, log, activations, rank, size):
    encoded, exported = checkpoints["llama", activations]
    (model, config), (expected, plain_config) = load(encoded, rank, size), load(exported, rank, size)
    layers = encoded_layers(model)
    assert len(layers) == 8
    for layer in layers.values():
        assert layer.quant_method.native.kernel.startswith(LINEAR[activations])
    assert_same(model, expected)
    assert len(log) == 1  # once for each choice
    assert f"computed by vLLM's {LINEAR[activations]}" in log[0]
    x = torch.randn(5, SIZES["hidden_size"], dtype=config.model_config.dtype)
    for name in (QKV, QKV.replace("self_attn.qkv", "mlp.gate_up")):
        assert torch.equal(model.get_submodule(name)(x)[0], expected.get_submodule(name)(x)[0])
    assert config.additional_config == {native.VARIABLE: "native"}  # compiled code is not shared with the codecs'
    assert plain_config.additional_config == {}


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_experts_hold_what_vllm_makes_of_the_exported_checkpoint(checkpoints, rank, size):
    (model, _), (expected, _) = (load(path, rank, size) for path in checkpoints["mixtral", "fp8"])
    assert_same(model, expected)
    method, wanted = (found.get_submodule(EXPERTS).quant_method for found in (model, expected))
    assert method.native.kernel == "CompressedTensorsW8A8Fp8MoEMethod with TritonExperts"
    assert type(method.moe_kernel.fused_experts) is type(wanted.moe_kernel.fused_experts)
    assert method.supports_internal_mk == wanted.supports_internal_mk
    assert torch.equal(method.moe_quant_config.w1_scale, wanted.moe_quant_config.w1_scale)
    calls = []
    method.native.method.apply = lambda *arguments: calls.append(arguments)
    method.apply("layer", "x", "weights", "ids", None, None)
    assert calls == [("layer", "x", "weights", "ids", None, None)]


def test_experts_whose_activations_are_not_rounded_stay_with_the_codec(checkpoints, tmp_path, log):
    plain = checkpoints["mixtral", "fp8"][0].parent / "plain"
    stack = Stack.from_dict({"fp8": {}})
    model, _ = load(save_checkpoint(*load_model(plain, stack), tmp_path / "encoded", stack))
    assert model.get_submodule(EXPERTS).quant_method.native is None
    assert model.get_submodule(EXPERTS).w13_weight.dtype == torch.uint8
    line = next(line for line in log if line.startswith("experts in fp8"))
    assert "computed by the codec (compressed-tensors: For Fused MoE layers, only format" in line


@pytest.mark.parametrize("name", [("llama", "full"), ("llama", "fp8"), ("mixtral", "fp8")], ids=str)
def test_weights_are_reloaded_into_the_same_memory(checkpoints, name):
    """As vLLM reloads them: outside of the context in which the model was built."""
    (model, config), (expected, _) = map(load, checkpoints[name])
    before = {key: parameter.data_ptr() for key, parameter in model.named_parameters()}
    for layer in encoded_layers(model).values():
        for parameter in layer.parameters(recurse=False):
            parameter.data.zero_()
    initialize_layerwise_reload(model)
    model.load_weights(DefaultModelLoader(config.load_config).get_all_weights(config.model_config, model))
    finalize_layerwise_reload(model, config.model_config)
    assert_same(model, expected)
    assert {key: parameter.data_ptr() for key, parameter in model.named_parameters()} == before


def with_480(encoded, path):
    """A copy with a code that other libraries read as NaN, in one layer."""
    shutil.copytree(encoded, path)
    (path / FILE_NAME).unlink()
    tensors = load_file(path / "model.safetensors")
    tensors[f"{DOWN}.weight"][3, 0, 5] = 0x7F
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_a_layer_with_numbers_that_the_format_lacks_stays_with_the_codec(checkpoints, tmp_path, log):
    encoded, _ = checkpoints["llama", "full"]
    model, config = load(with_480(encoded, tmp_path / "odd"))
    assert [name for name, layer in encoded_layers(model).items() if layer.quant_method.native is None] == [DOWN]
    assert [line for line in log if "holds 480" in line and line.startswith(f"{DOWN}: not computed by vLLM's")]
    layer, codec = model.get_submodule(DOWN), FP8Codec()
    assert not hasattr(layer, "scheme")
    x = torch.randn(5, SIZES["intermediate_size"], dtype=config.model_config.dtype)
    expected = codec.linear(x, {"": layer.weight, "_scale": layer.weight_scale}, (SIZES["hidden_size"], x.shape[1]))
    assert torch.equal(layer(x)[0], expected)


def test_such_numbers_cannot_be_reloaded_into_vllms_kernel(checkpoints, tmp_path):
    encoded, _ = checkpoints["llama", "full"]
    model, config = load(encoded)
    config.model_config.model = str(with_480(encoded, tmp_path / "odd"))
    initialize_layerwise_reload(model)
    with pytest.raises(CheckpointError, match=rf"{DOWN} cannot be reloaded into .*holds 480.*ARCTIC_VLLM_KERNELS=ours"):
        model.load_weights(DefaultModelLoader(config.load_config).get_all_weights(config.model_config, model))


def test_without_fp8_units_rounded_activations_stay_with_the_codec(checkpoints, monkeypatch, log):
    """vLLM falls back to unrounded activations there: its products would be others than those of training."""
    monkeypatch.setattr(
        CompressedTensorsConfig, "_check_scheme_supported", lambda self, *_, error=True, **__: error
    )  # as on a card of capability 8.0
    model, _ = load(checkpoints["llama", "fp8"][0])
    assert all(layer.quant_method.native is None for layer in encoded_layers(model).values())
    assert len(log) == 1
    assert "computed by the codec (compressed-tensors: vLLM's CompressedTensorsW8A16Fp8 with WeightOnly would" in log[0]


def test_files_for_each_process_keep_the_codecs_bytes(checkpoints, tmp_path):
    encoded, _ = checkpoints["llama", "full"]
    (tmp_path / "split").mkdir()
    shard_checkpoint(encoded, tmp_path / "split", 2)
    part = load_file(tmp_path / "split" / "model-rank-1-part-0.safetensors")
    whole = load_file(encoded / "model.safetensors")
    assert torch.equal(part[f"{DOWN}.weight"], whole[f"{DOWN}.weight"].chunk(2, 2)[1])


@pytest.mark.parametrize(
    ("setting", "on_gpu", "dtype", "is_wanted"),
    [
        ("", False, "bfloat16", False),
        ("", True, "bfloat16", True),
        ("", True, "float16", False),
        ("ours", True, "bfloat16", False),
        ("native", False, "float32", True),
    ],
)
def test_the_variable_and_the_device_decide(monkeypatch, setting, on_gpu, dtype, is_wanted, log):
    monkeypatch.setenv(native.VARIABLE, setting)
    monkeypatch.setattr(native, "on_gpu", lambda: on_gpu)
    monkeypatch.setattr(native, "model_dtype", lambda: getattr(torch, dtype))
    config = ArcticConfig.from_config({"quant_method": "arctic", "format": 1, "codecs": {}, "modules": {}})
    assert [form.name for form in config.formats(FP8Codec())] == (["compressed-tensors"] if is_wanted else [])
    assert [line.partition(":")[0] for line in log] == (["torch.float16"] if dtype == "float16" else [])


def test_what_vllm_has_no_exact_format_for_stays_with_the_codec(log):
    config = ArcticConfig.from_config({"quant_method": "arctic", "format": 1, "codecs": {}, "modules": {}})
    for other in (FP8Codec(group_size=128), FP8Codec(bits=6), FP8Codec(bits=12)):  # fp8-block would hold them, rounded
        assert config.formats(other) == []
        assert f"{other.describe()}: computed by the codec (vLLM has no format" in log[-1]
    assert config.formats(FP8Codec(), FP8Codec(activations="fp8")) == []  # one experts layer


def test_an_unknown_setting_is_an_error(monkeypatch):
    monkeypatch.setenv(native.VARIABLE, "marlin")
    with pytest.raises(ConfigError, match="ARCTIC_VLLM_KERNELS=marlin; expected native or ours"):
        native.are_wanted()


def test_the_doctor_reports_who_computes(monkeypatch):
    text = {found.subject: found.text for found in check_worker()}["vllm kernels"]
    assert "vLLM's CompressedTensorsW8A16Fp8 with WeightOnly computes fp8 (bits 8, group_size channel); fp8 (" in text
    assert "TritonExperts computes experts in fp8 (bits 8, group_size channel, activations fp8)" in text
    assert "all other encoded weights are computed by their codecs (ARCTIC_VLLM_KERNELS=native)" in text
    monkeypatch.delenv(native.VARIABLE)
    text = {found.subject: found.text for found in check_worker()}["vllm kernels"]
    assert text == "all encoded weights are computed by their codecs (ARCTIC_VLLM_KERNELS=unset)"


def test_scratch_is_not_reused_in_a_captured_graph(monkeypatch):
    """A graph keeps addresses; the buffer is replaced when a larger one is needed."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert take_scratch((2, 3), torch.bfloat16, torch.device("cuda")) is None
