"""Models for other tasks than generating text: classifiers, embeddings, models that read images."""

import json
import re

import pytest
import torch
from arctic_plugins_huggingface import freeze, load_model, merge_adapter, plan_model, register, save_checkpoint
from arctic_plugins_huggingface.checkpoints.export import export_checkpoint
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_huggingface.loading import head_modules
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    T5Config,
)

from arctic_plugins import Stack
from arctic_plugins.cli import main
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.frozen import FrozenLinear
from arctic_plugins.testing import MIXTURES, draw_adapter, tiny_model

IDS = torch.arange(10, 42)[None]
FP8 = Stack.from_dict({"fp8": {}})
LORA = Stack.from_dict({"lora": {"r": 4}})
NAMES = {0: "good", 1: "bad", 2: "so so"}


@torch.no_grad()
def hidden(model):
    return model.base_model(IDS).last_hidden_state


@torch.no_grad()
def outputs(model):
    return model(IDS)[0]


def encoder(directory, model_type="bert"):
    """A tiny encoder as it was pretrained, with a head that fills gaps."""
    sizes = {"num_key_value_heads": 4, "dim": 64, "hidden_dim": 176, "n_heads": 4, "n_layers": 2, "embedding_size": 64}
    ends = {"cls_token_id": 0, "sep_token_id": 1, "head_dim": 16}
    return tiny_model(directory, model_type, auto_class="AutoModelForMaskedLM", **sizes, **ends)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return encoder(tmp_path_factory.mktemp("models") / "bert")


def encoded_modules(checkpoint):
    return json.loads((checkpoint / "config.json").read_text())["quantization_config"]["modules"]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_encoded_checkpoint_is_read_with_and_without_a_head(tmp_path, name):
    """As transformers does with plain ones: AutoModel from a model with a head, and the other way round."""
    model_type, config = MIXTURES.get(name, (name, {}))
    model, tokenizer = load_model(tiny_model(tmp_path / "plain", model_type, **config), FP8)
    expected = hidden(model)
    whole = save_checkpoint(model, tokenizer, tmp_path / "whole", FP8)
    register()
    base = AutoModel.from_pretrained(whole)
    assert torch.equal(hidden(base), expected)
    assert torch.equal(hidden(load_model(whole, auto_class=AutoModel)[0]), expected)
    saved = save_checkpoint(base, tokenizer, tmp_path / "base", FP8)
    with safe_open(saved / "model.safetensors", "pt") as file:
        modules = {key.removesuffix(".weight_scale") for key in file.keys() if key.endswith("_scale")}  # noqa: SIM118
    assert all(module.startswith("layers.") for module in modules)
    assert all(pattern.startswith("layers.*.") for pattern in encoded_modules(saved))
    assert torch.equal(hidden(load_model(saved)[0]), expected)
    classifier, _ = load_model(saved, auto_class=AutoModelForSequenceClassification, id2label=NAMES)
    assert torch.equal(hidden(classifier), expected)
    assert classifier.score.out_features == 3


@pytest.mark.parametrize(
    ("model_type", "heads"),
    [
        ("bert", ["bert.pooler", "classifier"]),
        ("roberta", ["classifier"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("modernbert", ["head", "classifier"]),
        ("albert", ["albert.pooler", "classifier"]),
    ],
)
def test_the_head_of_a_classifier_stays_plain_and_is_trained(tmp_path, model_type, heads):
    checkpoint = encoder(tmp_path / "encoder", model_type)
    model = freeze(AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3), FP8)
    assert head_modules(model) == heads
    for head in heads:
        parts = list(model.get_submodule(head).modules())
        assert not any(isinstance(part, FrozenLinear) for part in parts)
        assert all(parameter.requires_grad for parameter in model.get_submodule(head).parameters())
    assert sum(isinstance(module, FrozenLinear) for module in model.modules()) >= 6
    trained, _ = load_model(
        checkpoint, Stack.from_dict({"fp8": {}, "lora": {"r": 4}}), auto_class=AutoModelForSequenceClassification
    )
    trainable = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    for head in heads:
        assert any(f".{head}.modules_to_save." in name for name in trainable)
    trained(IDS, labels=torch.tensor([1])).loss.backward()
    assert all(trained.get_parameter(name).grad is not None for name in trainable)


def test_only_a_new_head_may_be_missing(tiny_checkpoint, tmp_path, caplog):
    model, tokenizer = load_model(tiny_checkpoint, auto_class=AutoModelForSequenceClassification)
    assert "has no head for text-classification: initialized at random" in caplog.text
    assert "score.weight" in caplog.text
    classifier = save_checkpoint(model, tokenizer, tmp_path / "classifier", Stack())
    caplog.clear()
    assert torch.equal(outputs(load_model(classifier)[0]), outputs(model))
    assert "has no head" not in caplog.text
    with pytest.raises(CheckpointError, match="lacks 1 weights .* lm_head.weight; it is a LlamaForSequenceClassif"):
        load_model(classifier, auto_class=AutoModelForCausalLM)
    (classifier / "arctic_plugins.json").unlink()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "score.weight"}
    model.save_pretrained(classifier, state_dict=state)
    with pytest.raises(CheckpointError, match="lacks 1 weights .* score.weight; the checkpoint is incomplete"):
        load_model(classifier)


def test_a_model_without_a_class_for_the_task_names_the_tasks_that_it_has(tmp_path, bert):
    T5Config(d_model=8, architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"models of type t5 have no class for the task text-generation; expected the task feature-extraction or "
        r"question-answering or text-classification or token-classification; set 'task'",
    ):
        plan_model(tmp_path, config=config, checked=True)
    with pytest.raises(CheckpointError, match="models of type bert have no class for the task image-text-to-text"):
        load_model(bert, auto_class=AutoModelForImageTextToText)


@pytest.mark.parametrize(
    "auto_class",
    [
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
        AutoModel,
    ],
)
@pytest.mark.parametrize("plugins", [{}, {"fp8": {}}], ids=["plain", "fp8"])
def test_an_adapter_brings_its_task_its_head_and_its_labels(bert, tmp_path, auto_class, plugins):
    stack = Stack.from_dict({**plugins, "lora": {"r": 4}})
    labels = {"id2label": NAMES, "problem_type": "single_label_classification"}
    labeled = auto_class in (AutoModelForSequenceClassification, AutoModelForTokenClassification)
    model, tokenizer = load_model(bert, stack, auto_class=auto_class, **(labels if labeled else {}))
    draw_adapter(model)
    adapter = save_checkpoint(model, tokenizer, tmp_path / "adapter", stack)
    again, _ = load_checkpoint(adapter)
    torch.testing.assert_close(hidden(again.get_base_model()), hidden(model.get_base_model()), rtol=1e-5, atol=1e-5)
    merged, _ = load_model(merge_adapter(adapter, tmp_path / "merged"))
    assert type(merged) is type(model.get_base_model())
    if labeled:
        assert (merged.config.id2label, merged.config.problem_type) == (NAMES, "single_label_classification")
    if plugins:
        assert sum(isinstance(module, FrozenLinear) for module in merged.modules()) == 12
    else:
        torch.testing.assert_close(outputs(merged), outputs(model), rtol=1e-5, atol=1e-5)
    for head in head_modules(merged):
        for name, parameter in merged.get_submodule(head).named_parameters():
            saved = model.get_base_model().get_submodule(head).modules_to_save["default"].get_parameter(name)
            assert torch.equal(parameter, saved)
    for checkpoint in (adapter, tmp_path / "merged"):
        with pytest.raises(ConfigError, match="is a model for .*, which does not generate text"):
            load_checkpoint(checkpoint, generates=True)


def test_an_encoded_classifier_is_exported(tiny_checkpoint, tmp_path):
    model, tokenizer = load_model(tiny_checkpoint, FP8, auto_class=AutoModelForSequenceClassification, id2label=NAMES)
    encoded = save_checkpoint(model, tokenizer, tmp_path / "encoded", FP8)
    export_checkpoint(encoded, tmp_path / "exported", "compressed-tensors")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {str(number): name for number, name in NAMES.items()}


def test_quantizing_for_a_task(tiny_checkpoint, tmp_path, capsys):
    for task, options, status in (
        ("embeddings", ["--task", "feature-extraction"], 0),
        ("own", [], 0),
        ("unknown", ["--task", "summarization"], 2),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["quantize", str(tiny_checkpoint), str(tmp_path / task), *options])
        assert ended.value.code == status
    assert "task is 'summarization'; expected one of feature-extraction, " in capsys.readouterr().err
    for name, architecture in (("embeddings", "LlamaModel"), ("own", "LlamaForCausalLM")):
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == [architecture]


def test_labels_that_are_none_are_told(tiny_checkpoint):
    for labels in ({"id2label": 3}, {"id2label": {"x": "y"}}, {"num_labels": "many"}):
        with pytest.raises(ConfigError, match="the labels are not valid: .*; correct (id2label|num_labels) under load"):
            plan_model(tiny_checkpoint, auto_class=AutoModelForSequenceClassification, **labels)


TEXT = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
READS_IMAGES = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_id": 5,
        "vision_feature_layer": -1,
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **TEXT, "sliding_window": 16},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "image_token_index": 5,
        "mm_tokens_per_image": 4,
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": VISION,
        "image_token_id": 5,
    },
    "qwen3_vl": {
        "text_config": {
            **TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 14,
            "deepstack_visual_indexes": [0],
        },
        "image_token_id": 5,
        "video_token_id": 6,
    },
}


@pytest.mark.parametrize("model_type", READS_IMAGES)
def test_of_a_model_that_reads_images_the_language_model_is_encoded_and_adapted(tiny_checkpoint, tmp_path, model_type):
    tokenizer = load_model(tiny_checkpoint)[1]
    plain = tmp_path / "plain"
    config = AutoConfig.for_model(model_type, **READS_IMAGES[model_type])
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    model, _ = load_model(plain, Stack.from_dict({"fp8": {}, "lora": {"r": 4}}))
    inner = model.get_base_model()
    language = {id(module) for module in inner.base_model.get_decoder().modules()}
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) or name.endswith(".lora_A"):
            assert any(id(parent) in language for parent in parents(model, name)), name
    encoded = save_checkpoint(*load_model(plain, FP8), tmp_path / "encoded", FP8)
    with safe_open(encoded / "model.safetensors", "pt") as file:  # whose names may differ from the model's
        stored = {key.removesuffix(".weight_scale") for key in file.keys() if key.endswith("_scale")}  # noqa: SIM118
    assert len(stored) == 14
    assert {re.sub(r"\.\d+\.", ".*.", name) for name in stored} == encoded_modules(encoded).keys()
    assert type(load_model(encoded)[0]) is type(inner)
    model, _ = load_model(plain, LORA)
    draw_adapter(model)
    merged = merge_adapter(save_checkpoint(model, tokenizer, tmp_path / "adapter", LORA), tmp_path / "merged")
    torch.testing.assert_close(outputs(load_model(merged)[0]), outputs(model), rtol=1e-4, atol=1e-4)


def parents(model, name):
    while name := name.rpartition(".")[0]:
        yield model.get_submodule(name)


def test_a_processor_stays_with_the_model_and_its_adapter(tiny_checkpoint, tmp_path, capsys):
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    tokenizer, plain = load_model(tiny_checkpoint)[1], tmp_path / "plain"
    config = AutoConfig.for_model("llava", **READS_IMAGES["llava"])
    AutoModelForImageTextToText.from_config(config).save_pretrained(plain)
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    LlavaProcessor(CLIPImageProcessorPil(**sizes), tokenizer, patch_size=14).save_pretrained(plain)
    model, processor = load_model(plain, LORA)
    assert isinstance(processor, LlavaProcessor)
    merged = merge_adapter(save_checkpoint(model, processor, tmp_path / "adapter", LORA), tmp_path / "merged")
    assert isinstance(load_model(merged)[1], LlavaProcessor)
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(merged), "x", "--max-new-tokens", "1"])
    assert ended.value.code == 0
