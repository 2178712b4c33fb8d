"""Relatives of Llama: encoded, trained over, merged and reloaded, each with what it adds
(arctic_plugins/testing/models.py).
"""

import pytest
import torch
from arctic_plugins_huggingface import load_model
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from transformers import AutoModelForCausalLM

from arctic_plugins import Stack
from arctic_plugins.frozen import FrozenLinear
from arctic_plugins.testing import LLAMA_LIKE

IDS = torch.arange(10, 60)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("name", "codec", "tolerance"),
    [
        *((name, {"fp8": {"group_size": 64}}, 0.04) for name in LLAMA_LIKE),
        ("llama", {"bnb": {"type": "nf4"}}, 0.1),
        ("llama", {"bnb": {"type": "int8"}}, 0.01),
    ],
)
def test_encode_train_merge_reload(train_relative, name, codec, tolerance):
    checkpoint, result, merged = train_relative(name, codec)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    encoded, _ = load_model(checkpoint, Stack.from_dict(codec))
    frozen = {name for name, module in encoded.named_modules() if isinstance(module, FrozenLinear)}
    assert frozen == {
        name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    for name in frozen:
        layer = encoded.get_submodule(name)
        assert (layer.bias is None) == (plain.get_submodule(name).bias is None)
        weight = plain.get_submodule(name).weight
        assert (layer.decode() - weight).norm() / weight.norm() < tolerance
        weight.data.copy_(layer.decode())
    torch.testing.assert_close(logits(encoded), logits(plain), rtol=1e-4, atol=1e-4)

    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0]
    adapted = logits(load_checkpoint(result.directory)[0])
    assert not torch.equal(adapted, logits(encoded))
    again, _ = load_model(merged)
    assert {name for name, module in again.named_modules() if isinstance(module, FrozenLinear)} == frozen
    assert torch.equal(logits(again), logits(load_model(merged)[0]))
    assert (logits(again) - adapted).norm() < (
        logits(AutoModelForCausalLM.from_pretrained(checkpoint)) - adapted
    ).norm()
