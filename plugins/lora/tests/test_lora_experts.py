"""LoRA on the experts of mixtures: PEFT's adapters, over the bytes of any codec."""

import copy
import json
from pathlib import Path

import pytest
import torch
from arctic_plugins_huggingface import load_model, merge_adapter, register
from arctic_plugins_huggingface.adapters.lora import (
    ExpertPairs,
    FrozenLoraExperts,
    expert_pairs,
    load_adapter,
)
from arctic_plugins_huggingface.checkpoints import merge as merging
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_huggingface.checkpoints.save import save_checkpoint
from arctic_plugins_huggingface.loading.weights import frozen_weights
from arctic_plugins_huggingface.training.recipe import Recipe
from arctic_plugins_huggingface.training.run import train
from arctic_plugins_lora.config import LoraOptions
from arctic_plugins_lora.hf import add_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from arctic_plugins import Stack, stack_from_checkpoint
from arctic_plugins.errors import CheckpointError, CodecError, ConfigError
from arctic_plugins.frozen import FrozenExperts
from arctic_plugins.testing import MIXTURES, run_processes, said, tiny_model

IDS = torch.arange(10, 42)[None]
FP8 = {"group_size": 32}
LORA = {"r": 3, "alpha": 6, "experts": True}
MODELS = {
    **MIXTURES,
    "arctic": (
        "arctic",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layer_frequency": 1, "parallel_attn_mlp_res": True},
    ),
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
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + len(name))) * 0.1
                )
    return model


def adapted(checkpoint, **options):
    model, _ = load_model(checkpoint, Stack.from_dict({"fp8": FP8, "lora": LORA, **options}))
    return randomize(model)


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, FrozenLoraExperts)]


def peft_config(model):
    """What a user of PEFT alone would write for the adapter of ``model``."""
    config = model.peft_config["default"]
    return LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=config.target_modules,
        target_parameters=config.target_parameters,
        task_type="CAUSAL_LM",
    )


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
    assert any(
        key.endswith("mlp.experts.base_layer.lora_A.weight") or "block_sparse_moe.experts.base_layer.lora_A" in key
        for key in ours
    )
    base, _ = load_model(mixture, Stack.from_dict({"fp8": FP8}))
    assert torch.equal(load_adapter(base, tmp_path / "theirs").eval()(IDS).logits, model(IDS).logits)
    over_plain, _ = load_model(mixture, Stack.from_dict({"lora": LORA}))
    assert torch.equal(randomize(over_plain).eval()(IDS).logits, plain(IDS).logits)
    decoded, _ = load_model(mixture, Stack.from_dict({"fp8": FP8}))
    decoded = PeftModel.from_pretrained(decoded.dequantize(torch.float32), tmp_path / "ours").eval()
    torch.testing.assert_close(decoded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["host", "disk"])
def test_placements_change_nothing(mixtral, to, tmp_path):
    placement = {"offload": {"ratio": 1.0, "to": to, **({"path": str(tmp_path)} if to == "disk" else {})}}
    expected, found = (gradients(adapted(mixtral, **options)) for options in ({}, placement))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(mixture, use_reentrant):
    model = adapted(mixture).train()
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients(model)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=name)


def test_autocast_computes_in_its_dtype(mixtral):
    model = adapted(mixtral)
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model)
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(grad.flatten(), expected[name].flatten(), 0) > 0.98, name


def test_only_experts_with_rows_are_touched(mixtral):
    layer = wrappers(adapted(mixtral))[0]
    frozen = layer.get_base_layer()
    x, index = torch.randn(3, 64, requires_grad=True), torch.tensor([[1, 3], [3, 1], [3, 1]])
    layer(x, index, torch.ones(3, 2)).sum().backward()
    for wrapper in (layer, layer.base_layer):
        for parameter, last in ((wrapper.lora_A["default"].weight, False), (wrapper.lora_B["default"].weight, True)):
            by_expert = ExpertPairs(3, last).split(parameter.grad).abs().sum((1, 2))
            assert [bool(total) for total in by_expert] == [False, True, False, True]
    assert torch.equal(layer(x, torch.full_like(index, 4), torch.ones(3, 2)), torch.zeros(3, 64))  # nobody's rows
    assert set(frozen.updates) == {"gate_up_proj", "down_proj"}


def test_switched_off_it_is_the_base(mixtral):
    model = adapted(mixtral).eval()
    base, _ = load_model(mixtral, Stack.from_dict({"fp8": FP8}))
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert not torch.equal(model(IDS).logits, base(IDS).logits)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)
    assert torch.equal(model.unload()(IDS).logits, base(IDS).logits)
    assert not any(module.updates for module in model.modules() if isinstance(module, FrozenExperts))


def test_a_second_adapter_beside_the_first(mixtral):
    model = adapted(mixtral).eval()
    first = model(IDS).logits
    model.add_adapter("second", peft_config(model))
    model.set_adapter("second")
    base, _ = load_model(mixtral, Stack.from_dict({"fp8": FP8}))
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits)  # it starts as zero
    assert {frozenset(layer.lora_A) for layer in wrappers(model)} == {frozenset({"default", "second"})}
    assert len(wrappers(model)) == 4
    randomize(model, seed=1)
    second = model(IDS).logits
    model.merge_adapter()
    assert 0 < (model(IDS).logits - second).norm() / second.norm() < 0.5
    model.unmerge_adapter()
    randomize(model)
    model.set_adapter("default")
    torch.testing.assert_close(model(IDS).logits, first)


def test_the_order_in_which_weights_were_loaded_is_no_matter(mixtral):
    model, _ = load_model(mixtral, Stack.from_dict({"fp8": FP8}))
    for module in model.modules():
        if isinstance(module, FrozenExperts):
            module.hold(module.export("gate_up_proj"), "gate_up_proj")  # now after down_proj
    names = [layer.parameter_name for layer in wrappers(add_adapter(model, LoraOptions(experts=True)))]
    assert names == [layer.parameter_name for layer in wrappers(adapted(mixtral))] == ["down_proj", "gate_up_proj"] * 2


def test_experts_can_still_be_computed_in_steps(mixtral):
    layer = wrappers(adapted(mixtral))[0]
    routed = torch.randn(3, 64), torch.tensor([[1, 3], [3, 1], [0, 1]]), torch.ones(3, 2)
    mixture = layer.start(*routed)
    mixture.compute()
    assert torch.equal(mixture.result(), layer(*routed))


def test_several_merges_are_undone_at_once(mixtral):
    model = adapted(mixtral).eval()
    model.add_adapter("second", peft_config(model))
    randomize(model, seed=1)
    before = model(IDS).logits
    layer = wrappers(model)[0]
    kept = {suffix: buffer.clone() for suffix, buffer in layer.get_base_layer().export("down_proj").items()}
    base, _ = load_model(mixtral, Stack.from_dict({"fp8": FP8}))
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert layer.merged_adapters == ["default", "second"]
    with model.disable_adapter():  # PEFT takes merged adapters out again
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits)
    assert all(
        torch.equal(buffer, layer.get_base_layer().export("down_proj")[suffix]) for suffix, buffer in kept.items()
    )
    torch.testing.assert_close(model(IDS).logits, before)


def test_merge_is_decode_add_encode_and_can_be_undone(mixture):
    model = adapted(mixture).eval()
    before = model(IDS).logits
    layers = wrappers(model)
    kept = [
        {suffix: buffer.clone() for suffix, buffer in layer.get_base_layer().export(layer.parameter_name).items()}
        for layer in layers
    ]
    expected = []
    for layer in layers:
        frozen, leaf = layer.get_base_layer(), layer.parameter_name
        a, b = layer._pairs("default")
        expected.append(frozen.frozen[leaf].codec.encode(frozen.decode(leaf=leaf) + layer.scaling["default"] * b @ a))
    model.merge_adapter()
    for layer, buffers in zip(layers, expected, strict=True):
        found = layer.get_base_layer().export(layer.parameter_name)
        assert all(
            (found[suffix] != buffer).float().mean() < 1e-3 for suffix, buffer in buffers.items()
        )  # sums of another order may round elsewhere
    assert 0 < (model(IDS).logits - before).norm() / before.norm() < 0.5
    model.unmerge_adapter()
    for layer, buffers in zip(layers, kept, strict=True):
        assert all(
            torch.equal(buffer, layer.get_base_layer().export(layer.parameter_name)[suffix])
            for suffix, buffer in buffers.items()
        )
    torch.testing.assert_close(
        model(IDS).logits, before
    )  # PEFT subtracts what it added to plain layers, such as gates of shared experts


def test_a_merge_that_overflows_names_the_expert(mixtral):
    model = adapted(mixtral)
    layer = wrappers(model)[0]
    with torch.no_grad():
        ExpertPairs(3, last=True).split(layer.lora_B["default"].weight)[2] = float("inf")
    with pytest.raises(CodecError, match=r"mlp.experts.down_proj, expert 2: .*NaN"):
        layer.merge()


def recipe_of(checkpoint, directory, **plugins):
    records = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(16)]
    directory.mkdir(exist_ok=True)
    (directory / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    training = {
        "output_dir": str(directory / "out"),
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
    }
    recipe = {
        "model": str(checkpoint),
        "plugins": {**plugins, "lora": {"r": 4, "experts": True}},
        "data": {"path": "data.jsonl", "max_length": 64, "packing": True},
        "training": {**training, "gradient_checkpointing": True},
    }
    (directory / "recipe.yaml").write_text(json.dumps(recipe))
    return train(Recipe.from_file(directory / "recipe.yaml")).directory


@pytest.mark.parametrize("plugins", [{"fp8": {"group_size": 64}}, {}], ids=["fp8", "plain"])
def test_from_a_recipe_to_a_merged_checkpoint(mixture, tmp_path, plugins, monkeypatch):
    """Trained over bytes or plain weights, and merged into either, file by file as in memory."""
    adapter = recipe_of(mixture, tmp_path / "run", **plugins)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert [name.rpartition(".")[2] for name in sorted(config["target_parameters"])] == ["down_proj", "gate_up_proj"]
    trained = load_file(adapter / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in trained.items() if ".experts." in name)
    model, _ = load_checkpoint(adapter)
    save_checkpoint(model, _, tmp_path / "again", stack_from_checkpoint(adapter))
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert trained.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in trained.items())

    calls = []
    monkeypatch.setattr(
        merging, "load_model", lambda *args, **kwargs: calls.append(args) or load_model(*args, **kwargs)
    )
    merge_adapter(adapter, tmp_path / "by_file")
    assert not calls
    monkeypatch.setattr(merging, "_halves", lambda adapter: None)
    merge_adapter(adapter, tmp_path / "in_memory")
    assert calls
    by_file, _ = load_checkpoint(tmp_path / "by_file")
    in_memory, _ = load_checkpoint(tmp_path / "in_memory")
    torch.testing.assert_close(by_file(IDS).logits, in_memory(IDS).logits, rtol=1e-3, atol=2e-2 if plugins else 1e-4)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(mixture), adapter)
    if not plugins:
        torch.testing.assert_close(by_file(IDS).logits, stock(IDS).logits, rtol=1e-3, atol=1e-3)


def test_merging_into_an_encoded_base(mixture, tmp_path):
    model, tokenizer = load_model(mixture, Stack.from_dict({"fp8": FP8}))
    base = save_checkpoint(model, tokenizer, tmp_path / "encoded", Stack.from_dict({"fp8": FP8}))
    model, tokenizer = load_model(base, Stack.from_dict({"lora": LORA}))
    save_checkpoint(randomize(model), tokenizer, tmp_path / "adapter", Stack.from_dict({"lora": LORA}))
    merged, _ = load_checkpoint(merge_adapter(tmp_path / "adapter", tmp_path / "merged"))
    expected = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected.eval()(IDS).logits)
    found = frozen_weights(merged)
    for name, (module, leaf) in frozen_weights(expected).items():
        theirs, ours = module.export(leaf), found[name][0].export(leaf)
        assert all((theirs[suffix] != ours[suffix]).float().mean() < 1e-3 for suffix in theirs), (
            name
        )  # sums of another order may round elsewhere


def test_an_adapter_of_another_model_is_refused_in_a_line(mixtral, tmp_path):
    stack = Stack.from_dict({"fp8": FP8, "lora": LORA})
    model, tokenizer = load_model(mixtral, stack)
    save_checkpoint(model, tokenizer, tmp_path / "adapter", stack)
    register()
    other = tiny_model(tmp_path / "other", "mixtral", num_local_experts=2, num_experts_per_tok=1)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(other)})
    )
    with pytest.raises(CheckpointError) as error:
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert "\n" not in str(error.value)


def test_pairs_of_processes_make_the_whole(mixtral):
    model = adapted(mixtral)
    layouts, parameters = expert_pairs(model), dict(model.named_parameters())
    assert len(layouts) == 8
    assert all(".experts." in name and "lora_" in name for name in layouts)
    for name, pairs in layouts.items():
        whole = parameters[name].detach()
        parts = [pairs.part(whole, slice(first, first + 2)) for first in (0, 2)]
        assert parts[0].shape == (
            (whole.shape[0], whole.shape[1] // 2) if pairs.last else (whole.shape[0] // 2, whole.shape[1])
        )
        assert torch.equal(pairs.join(parts), whole)
        assert torch.equal(pairs.split(parts[1]), pairs.split(whole)[2:])


@pytest.mark.parametrize("mixture", ["mixtral", "arctic"], indirect=True)
@pytest.mark.parametrize("plugins", [{"fp8": FP8}, {}], ids=["fp8", "plain"])
def test_experts_of_several_processes(mixture, tmp_path, plugins):
    """Each has the pairs of its own experts; logits and gradients are those of one process."""
    pytest.importorskip("arctic_plugins_moe")
    adapted(mixture).save_pretrained(tmp_path)
    found = said(run_processes(Path(__file__).with_name("processes.py"), 2, mixture, tmp_path, plugins))
    assert len(found) == 2
    for process in found:
        assert process["pairs"] == 8
        assert process["logits"] < 1e-4
        assert process["gradients"] < 1e-3, process


def test_without_the_option_experts_stay_as_they_are(mixtral):
    model, _ = load_model(mixtral, Stack.from_dict({"fp8": FP8, "lora": {"r": 4}}))
    assert not any(".experts." in name and "lora_" in name for name, _ in model.named_parameters())
    assert model.peft_config["default"].target_parameters is None


def test_options_that_do_not_go_together(mixtral, tiny_checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="dropout 0.1 with experts"):
        Stack.from_dict({"lora": {"experts": True, "dropout": 0.1}})
    with pytest.raises(ConfigError, match="experts is true, but this model has no experts"):
        load_model(tiny_checkpoint, Stack.from_dict({"lora": {"experts": True}}))
    with pytest.raises(ConfigError, match="plugins.lora.r"):
        Stack.from_dict({"lora": {"experts": True, "r": 0}})
    model = adapted(mixtral)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    base, _ = load_model(mixtral, Stack.from_dict({"fp8": FP8}))
    for change, message in (
        ({"use_dora": True}, "has use_dora=True and adapts experts"),
        ({"lora_dropout": 0.1}, "has lora_dropout=0.1 and adapts experts"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": [], **change}))
        with pytest.raises(ConfigError, match=message):
            load_adapter(copy.deepcopy(base), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(CheckpointError, match="cannot be loaded onto its base model"):
        load_adapter(base, tmp_path)
