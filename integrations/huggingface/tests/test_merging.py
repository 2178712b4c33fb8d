"""Merging file by file gives what merging in memory gives, and never holds the model."""

import json

import pytest
import torch
from arctic_plugins_huggingface import load_model, merge_adapter, save_checkpoint
from arctic_plugins_huggingface.checkpoints import merge as merging_module
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from arctic_plugins import Stack
from arctic_plugins.errors import CheckpointError, CodecError
from arctic_plugins.testing import MIXTURES, draw_adapter, tiny_model

LORA = {"r": 4, "alpha": 8}


@pytest.fixture
def make_adapter(tmp_path):
    """A function that saves an adapter with something to say, trained (so to speak) through a stack."""

    def make(base, plugins):
        stack = Stack.from_dict(plugins)
        model, tokenizer = load_model(base, stack)
        draw_adapter(model, "lora_")
        return save_checkpoint(model, tokenizer, tmp_path / "adapter", stack)

    return make


def in_memory(monkeypatch, adapter, directory):
    with monkeypatch.context() as patched:
        patched.setattr(merging_module, "_halves", lambda adapter: None)
        return merge_adapter(adapter, directory)


def states(checkpoint):
    model, _ = load_model(checkpoint)
    return model.state_dict()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "codec", [{"fp8": {}}, {"fp8": {"bits": 6, "group_size": 32}}, {}, {"bnb": {}}, {"bnb": {"type": "int8"}}]
)
def test_the_same_as_in_memory(tiny_checkpoint, tmp_path, make_adapter, monkeypatch, codec, rslora):
    adapter = make_adapter(tiny_checkpoint, {**codec, "lora": {**LORA, "use_rslora": rslora}})
    expected = states(in_memory(monkeypatch, adapter, tmp_path / "memory"))
    monkeypatch.setattr(merging_module, "load_model", None)  # nobody loads a model
    found = states(merge_adapter(adapter, tmp_path / "files"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if not tensor.is_floating_point():  # sums in float32 of another order may round to the next number, rarely
            assert (tensor != found[name]).float().mean() < 1e-3, name
        else:
            torch.testing.assert_close(found[name], tensor, msg=name)


def test_an_encoded_base(tiny_checkpoint, tmp_path, make_adapter, monkeypatch):
    encoded = save_checkpoint(
        *load_model(tiny_checkpoint, stack := Stack.from_dict({"fp8": {}})), tmp_path / "encoded", stack
    )
    adapter = make_adapter(encoded, {"lora": LORA})
    expected = states(in_memory(monkeypatch, adapter, tmp_path / "memory"))
    monkeypatch.setattr(merging_module, "load_model", None)
    found = states(merge_adapter(adapter, tmp_path / "files"))
    for name, tensor in expected.items():
        if tensor.dtype == torch.uint8:
            assert (tensor != found[name]).float().mean() < 1e-3, name
        else:
            torch.testing.assert_close(found[name], tensor, msg=name)


def test_experts_are_encoded_on_the_way(tmp_path, make_adapter, monkeypatch):
    model_type, config = MIXTURES["mixtral"]
    base = tiny_model(tmp_path / "base", model_type, **config)
    adapter = make_adapter(base, {"fp8": {}, "lora": LORA})
    expected = states(in_memory(monkeypatch, adapter, tmp_path / "memory"))
    monkeypatch.setattr(merging_module, "load_model", None)
    found = states(merge_adapter(adapter, tmp_path / "files"))
    assert any("experts" in name and tensor.dtype == torch.uint8 for name, tensor in found.items())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0.1, atol=1, msg=name)
        assert (tensor != found[name]).float().mean() < 1e-2, name


def test_a_base_of_several_files_stays_one(tiny_checkpoint, tmp_path, make_adapter):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    load_model(tiny_checkpoint)[1].save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    files = {path.name for path in (tmp_path / "base").glob("*.safetensors")}
    assert len(files) > 3
    adapter = make_adapter(tmp_path / "base", {"fp8": {}, "lora": LORA})
    merged = merge_adapter(adapter, tmp_path / "merged")
    assert {path.name for path in merged.glob("*.safetensors")} == files
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == files
    assert "model.layers.0.mlp.up_proj.weight_scale" in index["weight_map"]
    with torch.no_grad():
        ids = torch.arange(10, 42)[None]
        one, other = (load_checkpoint(path)[0].eval()(ids).logits for path in (merged, adapter))
    assert (one - other).norm() / other.norm() < 0.5


def test_what_does_not_fit_is_named(tiny_checkpoint, tmp_path, make_adapter, monkeypatch):
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(tiny_checkpoint, {"lora": LORA})
    (adapter / "arctic_plugins.json").write_text(
        json.dumps(json.loads((adapter / "arctic_plugins.json").read_text()) | {"files": {}})
    )
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    save_file({**tensors, name: tensors[name] * float("inf")}, weights)
    with pytest.raises(CodecError, match=r"model\.layers\.0\.mlp\.up_proj: the merged weight contains NaN or Inf"):
        merge_adapter(adapter, tmp_path / "out")
    save_file({**tensors, name: tensors[name][:5].clone()}, weights)
    with pytest.raises(CodecError, match=r"model\.layers\.0\.mlp\.up_proj: the weight has shape .*, but the update"):
        merge_adapter(adapter, tmp_path / "out")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    with pytest.raises(CheckpointError, match=r"only half of the update of model\.layers\.0\.mlp\.up_proj"):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "lm_head"], ["q_proj", "embed_tokens"], ["embed_tokens", "lm_head"], ["q_proj"]],
    ids="-".join,
)
@pytest.mark.parametrize("codec", [{"fp8": {"group_size": 64}}, {}], ids=["fp8", "plain"])
@pytest.mark.parametrize("stored", ["once", "twice"])
def test_a_head_that_is_tied_to_the_embedding(tmp_path, make_adapter, targets, codec, stored):
    """Plain PEFT changes both where the adapter changed one; files may hold the shared weight twice."""
    base = tiny_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    if stored == "twice":
        tensors = load_file(base / "model.safetensors")
        save_file(
            {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
            base / "model.safetensors",
            metadata={"format": "pt"},
        )
    adapter = make_adapter(base, {**codec, "lora": {**LORA, "target_modules": targets}})
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        unmerged, plain = load_checkpoint(adapter)[0](ids).logits, load_model(base)[0](ids).logits
        merged, _ = load_model(merge_adapter(adapter, tmp_path / "merged"))
        found = merged(ids).logits
    assert (unmerged - plain).abs().max() > 1
    rounding = 0.1 if codec else 1e-4  # of the changed weights, once more
    assert (found - unmerged).norm() / unmerged.norm() < rounding
    assert merged.config.tie_word_embeddings == (targets == ["q_proj"])
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (targets == ["q_proj"])
