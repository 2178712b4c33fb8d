"""LoRA on the experts of mixtures: PEFT's adapters, over the bytes of any codec."""

import pytest
import torch
from arctic_plugins_huggingface import load_model, register
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from arctic_plugins import Stack
from arctic_plugins.frozen import FrozenExperts
from arctic_plugins.frozen.lora import FrozenLoraExperts, expert_pairs, load_adapter
from arctic_plugins.testing import MIXTURES, tiny_model

IDS = torch.arange(10, 42)[None]
FP8 = {"group_size": 32}
LORA = {"r": 3, "alpha": 6, "experts": True}
MODELS = {
    **{name: MIXTURES[name] for name in ("mixtral", "qwen3_moe", "olmoe")},
    "arctic": ("arctic", {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layer_frequency": 1, "parallel_attn_mlp_res": True}),
}


@pytest.fixture(scope="session", params=MODELS)
def mixture(request, tmp_path_factory):
    register()
    model_type, config = MODELS[request.param]
    return tiny_model(tmp_path_factory.mktemp(request.param), model_type, **config)


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory):
    model_type, config = MODELS["mixtral"]
    return tiny_model(tmp_path_factory.mktemp("mixtral"), model_type, **config)


def randomize(model, seed=0):
    """Adapters start as zero; give them something to say, the same for the same seed and names."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + len(name))) * 0.1)
    return model


def adapted(checkpoint, **options):
    model, _ = load_model(checkpoint, Stack.from_dict({"fp8": FP8, "lora": LORA, **options}))
    return randomize(model)


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, FrozenLoraExperts)]


def peft_config(model):
    """What a user of PEFT alone would write for the adapter of ``model``."""
    config = model.peft_config["default"]
    return LoraConfig(r=3, lora_alpha=6, target_modules=config.target_modules, target_parameters=config.target_parameters, task_type="CAUSAL_LM")


def gradients(model):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def reference(checkpoint, like):
    plain, _ = load_model(checkpoint, Stack.from_dict({"fp8": FP8}))
    return randomize(get_peft_model(plain.dequantize(torch.float32), peft_config(like)))


def test_gradients_equal_those_of_peft_over_the_decoded_weights(mixture):
    model = adapted(mixture)
    assert len(wrappers(model)) == 4
    plain = reference(mixture, model)
    expected, found = gradients(plain), gradients(model)
    assert expected.keys() == found.keys()
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
        assert grad.abs().sum() > 0


def test_adapters_go_both_ways(mixture, tmp_path):
    model = adapted(mixture).eval()
    model.save_pretrained(tmp_path / "ours")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(mixture), tmp_path / "ours").eval()
    plain.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(key.endswith("mlp.experts.base_layer.lora_A.weight") or "block_sparse_moe.experts.base_layer.lora_A" in key for key in ours)
    base, _ = load_model(mixture, Stack.from_dict({"fp8": FP8}))
    assert torch.equal(load_adapter(base, tmp_path / "theirs").eval()(IDS).logits, model(IDS).logits)
    over_plain, _ = load_model(mixture, Stack.from_dict({"lora": LORA}))
    assert torch.equal(randomize(over_plain).eval()(IDS).logits, plain(IDS).logits)
    decoded, _ = load_model(mixture, Stack.from_dict({"fp8": FP8}))
    decoded = PeftModel.from_pretrained(decoded.dequantize(torch.float32), tmp_path / "ours").eval()
    torch.testing.assert_close(decoded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
