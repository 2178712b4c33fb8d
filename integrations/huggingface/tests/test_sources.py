"""Several sources with weights, records that cannot be used, and what both leave in the counts."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from arctic_plugins_huggingface.loading.config import load_tokenizer
from arctic_plugins_huggingface.training.data import load_data
from arctic_plugins_huggingface.training.recipe import DataConfig, Recipe
from arctic_plugins_huggingface.training.resume import _data
from pydantic import ValidationError

from arctic_plugins.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture
def files(tmp_path):
    """Two files: ``big`` with 30 texts, ``small`` with 10."""
    for name, rows in (("big", 30), ("small", 10)):
        lines = [json.dumps({"text": f"{name} {number}"}) for number in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("big", "small")}


def texts(tokenizer, rows):
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


def sources(files, *weights, **others):
    given = [
        {"path": path, **({} if weight is None else {"weight": weight})}
        for path, weight in zip(files.values(), weights, strict=True)
    ]
    return DataConfig(sources=given, format="text", **others)


def test_without_weights_every_row_occurs_once(tokenizer, files):
    data = load_data(sources(files, None, None), tokenizer)
    expected = [f"big {number}" for number in range(30)] + [f"small {number}" for number in range(10)]
    assert texts(tokenizer, data.train) == expected
    assert (data.counts.rows, data.counts.shares) == (40, {"big.jsonl": 30, "small.jsonl": 10})
    assert "an epoch has 30 of big.jsonl, 10 of small.jsonl" in str(data.counts)


def test_weights_are_shares_of_rows_until_every_source_was_read(tokenizer, files):
    data = load_data(sources(files, 1, 3), tokenizer, seed=5)
    found = texts(tokenizer, data.train)
    assert {*found} == {f"big {number}" for number in range(30)} | {f"small {number}" for number in range(10)}
    kinds = Counter(text.split()[0] for text in found)
    assert kinds["big"] == 30
    assert 1.8 < kinds["small"] / kinds["big"] < 4.5
    assert data.counts.shares == {"big.jsonl": kinds["big"], "small.jsonl": kinds["small"]}
    assert data.counts.rows == 40
    assert texts(tokenizer, load_data(sources(files, 2, 6), tokenizer, seed=5).train) == found
    assert texts(tokenizer, load_data(sources(files, 1, 3), tokenizer, seed=6).train) != found


def test_no_row_is_repeated_until_the_first_source_ends(tokenizer, files):
    data = load_data(sources(files, 1, 3, stopping_strategy="first_exhausted"), tokenizer)
    found = texts(tokenizer, data.train)
    assert len({*found}) == len(found)
    assert data.counts.shares["small.jsonl"] == 10
    assert data.counts.shares["big.jsonl"] < 30


@pytest.mark.parametrize("weights", [(None, None), (1, 3)])
def test_rows_held_out_are_never_trained_on(tokenizer, files, weights):
    data = load_data(sources(files, *weights, eval_size=0.25), tokenizer)
    held_out = texts(tokenizer, data.eval)
    assert len(held_out) == 10
    assert not {*held_out} & {*texts(tokenizer, data.train)}


def test_sources_of_different_formats(tokenizer, files, tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"q": "a", "output": "b"}')
    chat = {"path": str(tmp_path / "chat.jsonl"), "format": "alpaca", "columns": {"instruction": "q"}}
    config = DataConfig(sources=[chat, {"path": files["small"], "format": "text"}], system="S")
    assert [source.system for source in config.sources] == ["S", "S"]
    first, *others = load_data(config, tokenizer).train
    assert tokenizer.decode([label for label in first["labels"] if label != -100]) == "b<|end|>"
    assert texts(tokenizer, others) == [f"small {number}" for number in range(10)]


@pytest.mark.parametrize("weights", [(None, None), (1, 1)])
def test_streams_are_mixed_likewise(tokenizer, files, weights):
    data = load_data(sources(files, *weights, streaming=True, shuffle_buffer=4), tokenizer, seed=1)
    first = texts(tokenizer, data.train)
    assert {text.split()[0] for text in first} == {"big", "small"}
    assert texts(tokenizer, data.train) == first
    if weights == (None, None):
        assert len(first) == data.counts.rows == 40


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "either path, or sources"),
        ({"path": "a.jsonl", "sources": [{"path": "b.jsonl"}]}, "either path, or sources"),
        ({"sources": []}, "at least one source"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "a weight for every source, or for none"),
        ({"sources": [{"path": "a", "weight": 0}]}, "greater than 0"),
        ({"sources": [{"path": "a"}, {"path": "b"}], "eval_split": "test"}, "not eval_split"),
        ({"sources": [{"path": "a", "format": "preference"}, {"path": "b"}]}, "or none"),
        ({"path": "a", "format": "preference", "packing": True}, "neither packing nor streaming"),
        ({"sources": [{"path": "a", "maxlength": 1}]}, "Extra inputs"),
    ],
)
def test_sources_that_contradict_each_other(config, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**config)


def test_paths_are_relative_to_the_recipe_and_recorded_with_their_digests(files, tmp_path):
    (tmp_path / "chat.jinja").write_text("x")
    data = {"sources": [{"path": "big.jsonl"}, {"path": "org/set"}], "format": "text", "chat_template": "chat.jinja"}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"model": "m", "data": data}))
    config = Recipe.from_file(tmp_path / "recipe.yaml").data
    assert [source.path for source in config.sources] == [files["big"], "org/set"]
    record = _data(config)
    assert record["sources[0].path"]["xxh3_128"]
    assert record["chat_template"]["bytes"] == 1
    assert record["sources[1].path"] == "org/set"
    assert {"sources[1].path", "sources[1].format", "chat_template"} <= _data(config, given=True).keys()


BAD = (
    '{"instruction": "a", "output": "fine"}',
    '{"instruction": "b"}',
    "{not json",
    "[1]",
    '{"instruction": "c", "output": "half \\ud83d of a pair"}',
    '{"instruction": "d", "output": "fine too"}',
)


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_records_are_skipped_and_counted(tokenizer, tmp_path, streaming):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(BAD))
    data = load_data(DataConfig(path=str(path), on_bad_record="skip", streaming=streaming), tokenizer)
    learnt = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in data.train]
    assert sorted(learnt) == ["fine too<|end|>", "fine<|end|>"]
    assert (data.counts.rows, data.counts.skipped) == (2, 4)
    places = [reason.split(":")[1].split()[0] for reason in data.counts.reasons]
    assert places == ["2", "3", "4"]
    assert f"; 4 records skipped: {path}:2 has no 'output', {path}:3 is not valid JSON" in str(data.counts)
    assert str(data.counts).endswith(", ...")


@pytest.mark.parametrize(("at", "message"), [(1, "has no 'output'"), (2, "is not valid JSON"), (3, "is list")])
def test_a_bad_record_ends_the_run_by_default(tokenizer, tmp_path, at, message):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([BAD[0], BAD[at]]))
    with pytest.raises(DataError, match=rf"data\.jsonl:2 {message}"):
        load_data(DataConfig(path=str(path)), tokenizer)


def test_what_is_skipped_of_the_evaluation_data_is_counted_too(tokenizer, tmp_path):
    (tmp_path / "data.jsonl").write_text(BAD[0])
    (tmp_path / "eval.jsonl").write_text("\n".join(BAD[:2]))
    paths = {"path": str(tmp_path / "data.jsonl"), "eval_path": str(tmp_path / "eval.jsonl")}
    data = load_data(DataConfig(**paths, on_bad_record="skip"), tokenizer)
    assert len(data.eval) == 1
    assert f"1 records skipped: {tmp_path}/eval.jsonl:2 has no 'output'" in str(data.counts)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_a_good_record_is_told(tokenizer, tmp_path, streaming):
    (tmp_path / "data.jsonl").write_text("\n".join(BAD[1:4]))
    config = DataConfig(path=str(tmp_path / "data.jsonl"), on_bad_record="skip", streaming=streaming)
    with pytest.raises(DataError, match=r"none of the 3 records of .* can be used, for example .*:1 has no 'output'"):
        load_data(config, tokenizer)


@pytest.mark.parametrize("form", ["text", "prompt_completion", "messages", "preference"])
def test_a_lone_surrogate_is_told_with_its_line(tokenizer, tmp_path, form):
    bad = "\ud83d"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": bad}]
    record = {
        "text": {"text": bad},
        "prompt_completion": {"prompt": "a", "completion": bad},
        "messages": {"messages": chat},
        "preference": {"prompt": "a", "chosen": bad, "rejected": "c"},
    }[form]
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps(record))
    with pytest.raises(DataError, match=r"data\.jsonl:2 contains the lone surrogate '\\ud83d'") as raised:
        load_data(DataConfig(path=str(path), format=form), tokenizer)
    str(raised.value).encode()


def test_nulls_of_a_parquet_file_reach_no_template(tokenizer, tmp_path):
    """Arrow gives each call the arguments of all others."""
    template = tokenizer.chat_template
    calls = [
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]}
        for arguments in ({"city": "Rome"}, {"day": 1})
    ]
    pq.write_table(pa.Table.from_pylist(calls), tmp_path / "data.parquet")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}"
        "{% endfor %}{{ m.content }}<|end|>{% endfor %}"
    )
    try:
        rows = load_data(DataConfig(path=str(tmp_path / "data.parquet"), format="messages", loss="all"), tokenizer)
    finally:
        tokenizer.chat_template = template
    assert texts(tokenizer, rows.train) == ['assistant:{"city": "Rome"}', 'assistant:{"day": 1}']
