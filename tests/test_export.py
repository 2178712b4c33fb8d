"""Exported checkpoints are read by stock transformers in a process where this project is not imported."""

import json

import pytest
import torch
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_fp8.export import CompressedTensors
from arctic_plugins_huggingface import load_model, save_checkpoint
from arctic_plugins_huggingface.checkpoints.export import convert_checkpoint, export_checkpoint
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from arctic_plugins import Stack
from arctic_plugins.errors import CheckpointError, CodecError, ConfigError, PluginNotFoundError
from arctic_plugins.frozen import FrozenLinear
from arctic_plugins.testing import run_python, tiny_llama

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
logits = model(torch.arange(24)[None]).logits
assert not any(name.startswith("arctic") for name in sys.modules), "the project was imported"
torch.save(logits, sys.argv[2])
"""


def encode(source, path, options):
    """Save ``source``, encoded by fp8 with ``options``, in ``path``; returns the model."""
    stack = Stack.from_dict({"fp8": options})
    model, tokenizer = load_model(source, stack)
    save_checkpoint(model, tokenizer, path, stack)
    return model


@pytest.fixture(scope="module")
def encoded(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "encoded"
    encode(tiny_checkpoint, path, {})
    return path


def stock_logits(path, tmp_path):
    run_python("-c", STOCK, path, tmp_path / "logits.pt")
    return torch.load(tmp_path / "logits.pt")


def test_stock_transformers_reads_compressed_tensors(encoded, tmp_path):
    exported = export_checkpoint(encoded, tmp_path / "out", "compressed-tensors")
    model, _ = load_model(encoded, dtype=torch.float32)
    torch.testing.assert_close(
        stock_logits(exported, tmp_path), model(torch.arange(24)[None]).logits, rtol=1e-4, atol=1e-4
    )
    assert not (exported / "arctic_plugins.json").exists()
    assert (exported / "tokenizer_config.json").is_file()


def test_stock_transformers_rounds_activations_too(tiny_checkpoint, tmp_path):
    model = encode(tiny_checkpoint, tmp_path / "encoded", {"activations": "fp8"})
    exported = export_checkpoint(tmp_path / "encoded", tmp_path / "out", "compressed-tensors")
    expected = model(torch.arange(24)[None]).logits
    torch.testing.assert_close(stock_logits(exported, tmp_path), expected, rtol=1e-4, atol=1e-4)
    plain, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}}))
    assert (plain(torch.arange(24)[None]).logits - expected).norm() > 0.01 * expected.norm()
    encode(tiny_checkpoint, tmp_path / "some", {"formats": {"**.mlp.*": {"activations": "fp8"}}})
    with pytest.raises(CodecError, match="only some modules have activations 'fp8'"):
        export_checkpoint(tmp_path / "some", tmp_path / "other", "compressed-tensors")


def test_stock_transformers_reads_fp8_block(tmp_path):
    source = tiny_llama(
        tmp_path / "plain", hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2
    )
    model = encode(source, tmp_path / "encoded", {"formats": {"**.mlp.*": {"bits": 12}}})
    exported = export_checkpoint(tmp_path / "encoded", tmp_path / "out", "fp8-block")
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with safe_open(exported / "model.safetensors", "pt") as file:
        for name, module in model.named_modules():
            if isinstance(module, FrozenLinear):
                weight, scale = file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.weight_scale_inv")
                blocks = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
                product, own = weight.float() * blocks, module.decode()
                assert (product - own).norm() <= 0.04 * own.norm()
                plain.get_submodule(name).weight.data = product
    torch.testing.assert_close(
        stock_logits(exported, tmp_path), plain(torch.arange(24)[None]).logits, rtol=1e-4, atol=1e-4
    )


def test_compressed_tensors_has_exactly_the_bytes(encoded, tmp_path):
    exported = export_checkpoint(encoded, tmp_path / "out", "compressed-tensors")
    model, _ = load_model(encoded)
    with safe_open(exported / "model.safetensors", "pt") as file:
        for name, module in model.named_modules():
            if isinstance(module, FrozenLinear):
                weight, scale = file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.weight_scale")
                assert weight.dtype == torch.float8_e4m3fn
                assert torch.equal(weight.float() * scale, module.decode())
    config = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]


def test_shards_stay_shards(encoded, tiny_checkpoint, tmp_path):
    stack = Stack.from_dict({"fp8": {}})
    model, _ = load_model(tiny_checkpoint, stack)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    exported = export_checkpoint(tmp_path / "sharded", tmp_path / "out", "compressed-tensors")
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {path.name for path in exported.glob("*.safetensors")}
    assert len(set(index.values())) > 2
    whole = export_checkpoint(encoded, tmp_path / "whole", "compressed-tensors")
    assert torch.equal(stock_logits(exported, tmp_path), stock_logits(whole, tmp_path))


def test_what_cannot_be_exported_is_told(encoded, tiny_checkpoint, tmp_path):
    encode(tiny_checkpoint, tmp_path / "mixed", {"formats": {"**.mlp.*": {"bits": 6}}})
    with pytest.raises(CodecError, match="mlp.* is encoded as FP8Codec.bits=6.*export to fp8-block"):
        export_checkpoint(tmp_path / "mixed", tmp_path / "out", "compressed-tensors")
    with pytest.raises(
        CodecError,
        match="model.layers.0.mlp.down_proj: the weight is 64 x 176; expected sizes that are multiples of 128",
    ):
        export_checkpoint(encoded, tmp_path / "out", "fp8-block")
    with pytest.raises(
        PluginNotFoundError, match="no installed plugin exports to 'fp8-blok'.*did you mean 'fp8-block'"
    ):
        export_checkpoint(encoded, tmp_path / "out", "fp8-blok")
    with pytest.raises(CheckpointError, match="is not encoded"):
        export_checkpoint(tiny_checkpoint, tmp_path / "out", "fp8-block")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export_checkpoint(encoded, tmp_path / "mixed", "fp8-block")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CodecError, match="holds 480"):
        CompressedTensors().tensors(
            FP8Codec(), {"": torch.full((4, 1, 8), 255, dtype=torch.uint8), "_scale": torch.ones(4, 1)}, (4, 8)
        )


@pytest.mark.parametrize("bits", [8, 6])
def test_deepspeedfp_there_and_back(tmp_path, bits):
    source = tiny_llama(
        tmp_path / "plain",
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
    )
    model = encode(
        source,
        tmp_path / "encoded",
        {"bits": bits, "group_size": 512, "exclude": ["lm_head", "**.k_proj", "**.q_proj", "**.v_proj"]},
    )
    exported = export_checkpoint(tmp_path / "encoded", tmp_path / "exported", "deepspeedfp")
    assert json.loads((exported / "config.json").read_text())["quantization_config"] == {
        "quant_method": "deepspeedfp",
        "bits": bits,
        "group_size": 512,
    }
    report = convert_checkpoint(exported, tmp_path / "converted", "deepspeedfp")
    assert f"model.layers.*.mlp.up_proj: fp8 (bits {bits}, group_size 512)" in report
    assert not any("q_proj" in line for line in report)
    found, _ = load_model(tmp_path / "converted")
    x = torch.arange(24)[None]
    expected = model(x).logits
    assert (found(x).logits - expected).norm() <= {8: 1e-3, 6: 0.05}[
        bits
    ] * expected.norm()  # zero is not a DeepSpeedFP number


def test_what_cannot_be_converted_is_told(encoded, tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="does not specify how it is quantized"):
        convert_checkpoint(tiny_checkpoint, tmp_path / "out", "deepspeedfp")
    with pytest.raises(CheckpointError, match="is already encoded by this project"):
        convert_checkpoint(encoded, tmp_path / "out", "deepspeedfp")
    with pytest.raises(PluginNotFoundError, match="no installed plugin converts from 'deepspeed'"):
        convert_checkpoint(encoded, tmp_path / "out", "deepspeed")
    assert not (tmp_path / "out").exists()
