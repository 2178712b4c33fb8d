"""Options of the plugin: every field of PEFT's ``LoraConfig`` is one, or is refused with a reason."""

import copy
import dataclasses

import pytest
import torch
from arctic_plugins_huggingface import load_model, merge_adapter, save_checkpoint
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_huggingface.loading.plan import plan_model
from arctic_plugins_huggingface.loading.weights import freeze_modules
from arctic_plugins_lora.config import CALLED, REFUSED, LoraOptions
from peft import LoraConfig

from arctic_plugins import Stack
from arctic_plugins.adapter import read_adapter
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.testing import MIXTURES, tiny_llama, tiny_model

IDS = torch.arange(10, 42)[None]
SOME = ["q_proj", "down_proj"]
OPTIONS = {
    "r": 3,
    "alpha": 7.5,
    "dropout": 0.5,
    "target_modules": ["q_proj"],
    "exclude_modules": ["down_proj"],
    "layers_to_transform": [1],
    "layers_pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"down_proj": 3.5},
    "bias": "lora_only",
    "init_lora_weights": "orthogonal",
    "use_rslora": True,
    "use_dora": True,
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [12, 13, 14],
    "ensure_weight_tying": {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]},
    "velora_config": {"num_groups": 8},
    "use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["down_proj"], "nblocks": 2},
}
"""A value for each option, or all that goes with it."""
OF_EXPERTS = {"experts": True, "target_parameters": ["mlp.experts.down_proj"]}


def test_every_field_of_peft_is_an_option_or_refused_with_a_reason():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    options = set(LoraOptions.model_fields)
    assert fields == (options - {*CALLED.values(), "experts"}) | set(REFUSED) | set(CALLED)
    assert options == {*OPTIONS, *OF_EXPERTS}


@pytest.mark.parametrize("name", [*REFUSED, *CALLED])
def test_a_field_that_is_not_an_option_is_refused_before_anything_is_loaded(name):
    with pytest.raises(ConfigError, match=rf"plugins\.lora\.{name} (cannot be set: \w|is not an option; it is called)"):
        Stack.from_dict({"lora": {name: None}})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("options"), attention_bias=True, mlp_bias=True, tie_word_embeddings=True)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(model):
    """One step of each trainable parameter, which must have a gradient; the adapter then does something."""
    torch.manual_seed(0)
    before = logits(model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    for _ in range(2):  # the first one may move B only
        model.train()(IDS, labels=IDS).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert (logits(model) - before).abs().max() > 0.01
    return model


@pytest.mark.parametrize("codec", [{}, {"fp8": {}}], ids=["plain", "fp8"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_trains_saves_loads_and_merges(checkpoint, tmp_path, name, codec):
    value = OPTIONS[name]
    options = value if isinstance(value, dict) and name in value else {name: value}
    stack = Stack.from_dict({**codec, "lora": {"r": 4, "target_modules": SOME, **options}})
    model, tokenizer = load_model(checkpoint, stack)
    save_checkpoint(trained(model), tokenizer, tmp_path / "adapter", stack)
    expected = logits(model)
    again, _ = load_checkpoint(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged")
    if codec:  # rounded to 8 bits once more
        assert (logits(merged) - expected).norm() / expected.norm() < 0.2
    else:
        torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_options_reach_peft(checkpoint):
    for name, value in OPTIONS.items():
        options = value if isinstance(value, dict) and name in value else {name: value}
        model, _ = load_model(checkpoint, Stack.from_dict({"lora": {"target_modules": SOME, **options}}))
        config = model.peft_config["default"]
        peft_name = {ours: theirs for theirs, ours in CALLED.items()}.get(name, name)
        found, given = getattr(config, peft_name), options[name]
        if dataclasses.is_dataclass(found):
            found = {key: field for key, field in dataclasses.asdict(found).items() if key in given}
        assert (set(found) == set(given)) if isinstance(found, set) else (found in (given, [given])), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": True}, "experts is true, but this model has no experts"),
        ({"lora_bias": True}, "lora_bias is true, but model.layers.0.self_attn.q_proj has no bias to merge into"),
        (
            {"trainable_token_indices": [5], "modules_to_save": ["embed_tokens"]},
            "trainable_token_indices and modules_to_save both train .*, or a weight tied to it; leave one of the two",
        ),
        ({"init_lora_weights": "mica", "r": 100}, "PEFT refuses this adapter for this model: MiCA requires `r` <="),
        ({"target_modules": ["model.norm"]}, "PEFT refuses this adapter for this model: Target module LlamaRMSNorm"),
        ({"modules_to_save": ["k_proj"]}, "trains a copy of model.layers.0.self_attn.k_proj, which is encoded"),
        ({"rank_pattern": {"q.*": 2}}, r"rank_pattern.q\.\* is .*; expected a name or the end of one, such as q_proj"),
        ({"velora_config": {"num_grups": 2}}, "velora_config.num_grups is not an option"),
        (
            {"layers_to_transform": [0], "target_modules": "all-linear"},
            "target_modules as a list of names with",
        ),
        ({"layers_pattern": "layers"}, "expected layers_to_transform with layers_pattern"),
        ({"experts": True, "use_dora": True}, "use_dora True with experts: PEFT does not support use_dora for experts"),
        ({"experts": True, "target_parameters": ["down_proj"]}, "experts or target_parameters, not both"),
        ({"init_lora_weights": "eva"}, "EVA reads data before training; write a script"),
    ],
)
def test_a_mistake_is_told_in_a_line(tmp_path, options, message):
    base = tiny_llama(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=message):
        load_model(base, Stack.from_dict({"fp8": {}, "lora": {"target_modules": SOME, **options}}))


@pytest.mark.parametrize("codec", [{}, {"fp8": {}}], ids=["plain", "fp8"])
def test_some_parameters_of_experts(tmp_path, codec):
    model_type, options = MIXTURES["qwen3_moe"]
    base = tiny_model(tmp_path / "base", model_type, **options)
    stack = Stack.from_dict(
        {**codec, "lora": {"r": 2, "target_modules": ["q_proj"], **OF_EXPERTS, "experts": False, "rank_pattern": {}}}
    )
    model, tokenizer = load_model(base, stack)
    adapted = {name.partition(".lora_")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "experts"}
    save_checkpoint(trained(model), tokenizer, tmp_path / "adapter", stack)
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "adapter")[0]), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", ["use_dora", "modules_to_save", "trainable_token_indices", "use_bdlora"])
def test_vllm_is_told_to_merge(tmp_path, option):
    config = LoraConfig(**{option: OPTIONS[option]}, target_modules=SOME, base_model_name_or_path="base")
    config.save_pretrained(tmp_path)
    assert getattr(read_adapter(tmp_path), option)
    with pytest.raises(CheckpointError, match=rf"has {option} .*; expected LoRA or rsLoRA, .*; merge the adapter"):
        Stack.from_dict({"lora": {}}).vllm_engine_args(tmp_path)


def test_a_model_that_is_only_planned(checkpoint):
    """``arctic train --dry-run`` counts the parameters of an adapter whose initialization reads the weights."""
    for options in ({"use_dora": True}, {"init_lora_weights": "mica"}, {"init_lora_weights": "orthogonal"}):
        stack = Stack.from_dict({"fp8": {}, "lora": {"r": 4, "target_modules": SOME, **options}})
        model, _ = load_model(checkpoint, stack)
        plan = plan_model(checkpoint, stack)
        planned = copy.deepcopy(plan.skeleton)
        freeze_modules(planned, plan.weights.codecs, {}, device="meta")
        counts = [
            sum(parameter.numel() for parameter in one.parameters() if parameter.requires_grad)
            for one in (model, stack.hf_transform_model(planned))
        ]
        assert counts[0] == counts[1]
