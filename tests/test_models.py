"""Relatives of Llama: encoded, trained over, merged and reloaded, each with what it adds (arctic_plugins/testing/models.py)."""

import json

import pytest
import torch
from arctic_plugins_huggingface import load_model, merge_adapter
from arctic_plugins_huggingface.recipe import Recipe
from arctic_plugins_huggingface.saving import load_checkpoint
from arctic_plugins_huggingface.sft import train
from transformers import AutoModelForCausalLM

from arctic_plugins import Stack
from arctic_plugins.frozen import FrozenLinear
from arctic_plugins.testing import LLAMA_LIKE, tiny_model

IDS = torch.arange(10, 60)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_encode_train_merge_reload(tmp_path, name):
    model_type, config = LLAMA_LIKE[name]
    checkpoint = tiny_model(tmp_path / "plain", model_type, **config)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    encoded, _ = load_model(checkpoint, Stack.from_dict({"fp8": {"group_size": 64}}))
    frozen = {name for name, module in encoded.named_modules() if isinstance(module, FrozenLinear)}
    assert frozen == {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"}
    for name in frozen:
        layer = encoded.get_submodule(name)
        assert (layer.bias is None) == (plain.get_submodule(name).bias is None)
        weight = plain.get_submodule(name).weight
        assert (layer.decode() - weight).norm() / weight.norm() < 0.04
        plain.get_submodule(name).weight.data.copy_(layer.decode())
    torch.testing.assert_close(logits(encoded), logits(plain), rtol=1e-4, atol=1e-4)

    records = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(16)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    recipe = {
        "model": str(checkpoint),
        "plugins": {"fp8": {"group_size": 64}, "lora": {"r": 4}},
        "data": {"path": "data.jsonl", "max_length": 64, "packing": True},
        "training": {"output_dir": str(tmp_path / "out"), "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True, "bf16": False},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = train(Recipe.from_file(tmp_path / "recipe.yaml"))
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0]
    adapted = logits(load_checkpoint(result.directory)[0])
    assert not torch.equal(adapted, logits(encoded))
    merged = merge_adapter(result.directory, tmp_path / "merged")
    again, _ = load_model(merged)
    assert {name for name, module in again.named_modules() if isinstance(module, FrozenLinear)} == frozen
    assert torch.equal(logits(again), logits(load_model(merged)[0]))
    assert (logits(again) - adapted).norm() < (logits(AutoModelForCausalLM.from_pretrained(checkpoint)) - adapted).norm()
