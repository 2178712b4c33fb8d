"""Labeled data: a recipe trains a classifier, which is saved, merged, resumed and used."""

import json
import random
import shutil

import pytest
import torch
from arctic_plugins_huggingface import load_model, merge_adapter
from arctic_plugins_huggingface.training.check import check_recipe
from arctic_plugins_huggingface.training.preparation import prepare
from arctic_plugins_huggingface.training.recipe import Recipe
from arctic_plugins_huggingface.training.run import train
from transformers import pipeline

from arctic_plugins.errors import ConfigError, DataError
from arctic_plugins.testing import tiny_llama, tiny_model

TRAINING = {
    "max_steps": 30,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 16,
    "logging_steps": 10,
    "bf16": False,
    "eval_strategy": "no",
    "save_strategy": "no",
}


def reviews(count=160):
    draw = random.Random(0)
    words = {"positive": ["good", "lovely"], "negative": ["bad", "awful"]}
    return [
        {"text": " ".join([*draw.choices(["a", "film", "was", "it"], k=4), draw.choice(words[label])]), "label": label}
        for label in draw.choices(sorted(words), k=count)
    ]


def recipe(tmp_path, checkpoint, records, *, data=(), training=(), **others):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))
    return Recipe.model_validate(
        {
            "model": str(checkpoint),
            "data": {"path": str(tmp_path / "rows.jsonl"), "max_length": 64, **dict(data)},
            "training": {"output_dir": str(tmp_path / "out"), **TRAINING, **dict(training)},
            **others,
        }
    )


@pytest.mark.parametrize("plugins", [{"fp8": {}, "lora": {"r": 8}}, {}], ids=["adapter", "whole"])
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_a_recipe_trains_a_classifier(tmp_path, model_type, plugins):
    if model_type == "llama":  # which has no padding token
        checkpoint = tiny_llama(tmp_path / "base", pad_token_id=None)
    else:
        sizes = {"num_attention_heads": 2, "initializer_range": 0.05}
        checkpoint = tiny_model(tmp_path / "base", "bert", auto_class="AutoModelForMaskedLM", **sizes)
    records, rate = reviews(), 1e-2 if plugins and model_type == "bert" else 5e-3
    options = {"learning_rate": rate, "eval_strategy": "steps", "eval_steps": 10}
    options |= {"save_strategy": "steps", "save_steps": 20}
    found = recipe(
        tmp_path,
        checkpoint,
        records,
        task="text-classification",
        data={"eval_size": 32},
        training=options,
        plugins=plugins,
    )
    result = train(found)
    accuracies = [entry["eval_accuracy"] for entry in result.history if "eval_accuracy" in entry]
    assert len(accuracies) == 3
    assert accuracies[-1] > 0.9
    final = merge_adapter(result.directory, tmp_path / "merged") if plugins else result.directory
    model, tokenizer = load_model(final)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.problem_type == "single_label_classification"
    assert model.config.pad_token_id is not None
    use = pipeline("text-classification", model=model, tokenizer=tokenizer)
    said = use([record["text"] for record in records], batch_size=16)
    assert sum(one["label"] == record["label"] for one, record in zip(said, records, strict=True)) > 140
    if plugins:  # what a checkpoint of the run holds, it holds with its labels
        early, _ = load_model(merge_adapter(tmp_path / "out" / "checkpoint-20", tmp_path / "early"))
        assert early.config.id2label == model.config.id2label


def test_an_interrupted_classifier_continues(tiny_checkpoint, tmp_path):
    options = {"max_steps": 6, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3}
    found = recipe(
        tmp_path,
        tiny_checkpoint,
        reviews(),
        data={"format": "classification"},
        training=options,
        plugins={"fp8": {}, "lora": {}},
    )
    whole = train(found)
    for directory in ("final", "checkpoint-6"):
        shutil.rmtree(tmp_path / "out" / directory)
    again = train(found, resume=True)
    losses = [[entry["loss"] for entry in result.history if "loss" in entry] for result in (whole, again)]
    assert losses[1] == losses[0]


def test_a_trained_classifier_keeps_its_labels(tiny_checkpoint, tmp_path):
    records = reviews()
    first = train(recipe(tmp_path, tiny_checkpoint, records, data={"format": "classification"}))
    (tmp_path / "second").mkdir()
    positive = [record for record in records if record["label"] == "positive"]  # by themselves a single class
    further = recipe(tmp_path / "second", first.directory, positive, data={"format": "classification"})
    run = prepare(further)
    assert run.labels.names == ("negative", "positive")
    assert set(run.data.train["labels"]) == {1}
    assert not run.model.new_head


@pytest.mark.parametrize(
    ("labels", "names", "problem_type", "rows"),
    [
        (["b", "a", "b"], ("a", "b"), "single_label_classification", [1, 0, 1]),
        ([10, 9, 10], ("9", "10"), "single_label_classification", [1, 0, 1]),
        ([True, False, True], ("False", "True"), "single_label_classification", [1, 0, 1]),
        ([["x"], [], ["x", "y"]], ("x", "y"), "multi_label_classification", [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]),
        ([0.5, 2, -1.0], ("value",), "regression", [0.5, 2.0, -1.0]),
    ],
    ids=["names", "numbers", "booleans", "several", "regression"],
)
def test_labels_are_what_they_look_like(tiny_checkpoint, tmp_path, labels, names, problem_type, rows):
    records = [{"text": "a b", "label": label} for label in labels]
    options = {"max_steps": 2}
    found = recipe(tmp_path, tiny_checkpoint, records, data={"format": "classification"}, training=options)
    run = prepare(found)
    assert (run.labels.names, run.labels.problem_type) == (names, problem_type)
    assert run.data.train["labels"] == rows
    assert run.model.skeleton.score.out_features == len(names)
    result = train(found)
    assert result.model.config.problem_type == problem_type


def test_pairs_columns_and_classes_that_are_set(tiny_checkpoint, tmp_path):
    records = [{"one": "ab", "two": "cde", "class": 1}, {"one": "f", "two": "g", "class": 0}]
    columns = {"text": "one", "text_pair": "two", "label": "class"}
    data = {"format": "classification", "columns": columns, "labels": ["no", "yes"]}
    run = prepare(recipe(tmp_path, tiny_checkpoint, records, data=data))
    assert run.data.train["labels"] == [1, 0]
    assert [len(ids) for ids in run.data.train["input_ids"]] == [5, 2]
    assert run.model.config.id2label == {0: "no", 1: "yes"}


def test_words_are_classified(tiny_checkpoint, tmp_path):
    draw = random.Random(1)
    records = []
    for _ in range(120):
        words = draw.choices(["Paris", "walks", "Rome", "sees"], k=5)
        records.append({"tokens": words, "tags": ["PLACE" if word[0].isupper() else "O" for word in words]})
    found = recipe(
        tmp_path,
        tiny_checkpoint,
        records,
        task="token-classification",
        data={"eval_size": 20, "labels": ["O", "PLACE"]},
        training={"eval_strategy": "steps", "eval_steps": 30},
        plugins={"fp8": {}, "lora": {"r": 8}},
    )
    row = prepare(found).data.train[0]
    assert sum(label != -100 for label in row["labels"]) == 5
    assert len(row["labels"]) == len(row["input_ids"]) > 5
    result = train(found)
    assert result.history[-2]["eval_accuracy"] > 0.9
    merged, _ = load_model(merge_adapter(result.directory, tmp_path / "merged"))
    assert type(merged).__name__ == "LlamaForTokenClassification"
    assert merged.config.id2label == {0: "O", 1: "PLACE"}


@pytest.mark.parametrize(
    ("records", "data", "message"),
    [
        ([{"text": "a"}], {}, r"rows\.jsonl:1 has no 'label'; .*set data.columns.label"),
        ([{"text": "\ud800", "label": "a"}, {"text": "", "label": "b"}], {}, r"rows\.jsonl:1 cannot be tokenized: "),
        ([{"text": 1, "label": "a"}], {}, r"rows\.jsonl:1 has text int; expected a text"),
        ([{"text": "a", "label": "x"}, {"text": "a", "label": "x"}], {}, "has the single class 'x'; .*at least two"),
        (
            [{"text": "a", "label": "x"}, {"text": "a", "label": "yy"}],
            {"labels": ["x", "y"]},
            r"rows\.jsonl:2 has label 'yy'; expected a known class; did you mean 'y'",
        ),
        (
            [{"text": "a", "label": ["x"]}, {"text": "a", "label": {"y": 1}}],
            {},
            r"rows\.jsonl:2 has label dict; expected a class",
        ),
        (
            [{"tokens": ["a", "b"], "tags": ["x"]}],
            {"format": "token_classification"},
            r"rows\.jsonl:1 has 2 tokens and 1 tags; expected as many",
        ),
        (
            [{"tokens": "a b", "tags": ["x"]}],
            {"format": "token_classification"},
            r"rows\.jsonl:1 has tokens str; expected a list of words",
        ),
    ],
)
def test_a_bad_record_is_named(tiny_checkpoint, tmp_path, monkeypatch, records, data, message):
    monkeypatch.setattr("arctic_plugins_huggingface.training.run.load_model", None)
    with pytest.raises(DataError, match=message):
        train(recipe(tmp_path, tiny_checkpoint, records, data={"format": "classification", **data}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {"format": "classification", "packing": True}}, "no packing with format 'classification'"),
        ({"data": {"format": "alpaca", "labels": ["a", "b"]}}, "no labels with format 'alpaca'"),
        ({"task": "text-classification", "data": {"format": "text"}}, "format of the task 'text-classification'"),
        (
            {"task": "text-generation", "data": {"format": "classification"}},
            "data.format of the task 'text-generation'",
        ),
        ({"task": "summarization"}, "task"),
        (
            {"load": {"num_labels": 3}, "data": {"format": "classification"}},
            "load.num_labels is set; expected data.labels",
        ),
        ({"load": {"auto_class": "AutoModel"}}, "load.auto_class is not an argument"),
    ],
)
def test_tasks_and_formats_that_do_not_fit_are_told(tiny_checkpoint, tmp_path, options, message):
    path = tmp_path / "recipe.yaml"
    (tmp_path / "rows.jsonl").write_text("{}")
    data = {"path": "rows.jsonl", **options.get("data", {})}
    path.write_text(
        json.dumps({"model": str(tiny_checkpoint), "training": {"output_dir": "x"}, **options, "data": data})
    )
    with pytest.raises(ConfigError, match=message):
        check_recipe(Recipe.from_file(path))


def test_a_classifier_is_not_trained_on_texts(tiny_checkpoint, tmp_path):
    first = train(
        recipe(tmp_path, tiny_checkpoint, reviews(), data={"format": "classification"}, training={"max_steps": 1})
    )
    (tmp_path / "second").mkdir()
    with pytest.raises(ConfigError, match="is a model for text-classification, but data.format is 'text'"):
        train(recipe(tmp_path / "second", first.directory, [{"text": "a"}], data={"format": "text"}))


def test_the_language_model_of_one_that_reads_images_is_trained_on_texts(tiny_checkpoint, tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 1}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", **text, **heads},
        vision_config={"model_type": "clip_vision_model", **vision, "image_size": 28, "patch_size": 14},
        image_token_id=5,
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "plain")
    load_model(tiny_checkpoint)[1].save_pretrained(tmp_path / "plain")
    records = [{"text": "one two three four"}] * 64
    found = recipe(
        tmp_path,
        tmp_path / "plain",
        records,
        data={"format": "text"},
        training={"max_steps": 10},
        plugins={"fp8": {}, "lora": {"r": 8}},
    )
    result = train(found)
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < 5.6  # ln 272, of a model that knows nothing
    merged, _ = load_model(merge_adapter(result.directory, tmp_path / "merged"))
    assert type(merged).__name__ == "LlavaForConditionalGeneration"
