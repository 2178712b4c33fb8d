"""From a user's file to tokens and labels: every format, every kind of file, and what is said of a bad one."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from arctic_plugins_huggingface.loading.config import load_tokenizer
from arctic_plugins_huggingface.loading.load import load_model
from arctic_plugins_huggingface.training.data import load_data
from arctic_plugins_huggingface.training.packing import check_packing
from arctic_plugins_huggingface.training.recipe import DataConfig
from datasets import IterableDataset
from pydantic import ValidationError
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from arctic_plugins import Stack
from arctic_plugins.errors import ConfigError, DataError
from arctic_plugins.testing import LLAMA_LIKE, MIXTURES, tiny_model

ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "hello"},
]
CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


def write(path, records):
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    return path


def spoken(tokenizer, row):
    """(everything, what counts) as text."""
    return tokenizer.decode(row["input_ids"]), tokenizer.decode([label for label in row["labels"] if label != -100])


def load(tokenizer, path, **config):
    return load_data(DataConfig(path=str(path), **config), tokenizer)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tokenizer, tmp_path, kind):
    rows = load(tokenizer, write(tmp_path / f"data.{kind}", ALPACA)).train
    assert [spoken(tokenizer, row) for row in rows] == [
        ("<|user|>Add.\n\n1 2<|end|><|assistant|>3<|end|>", "3<|end|>"),
        ("<|user|>Greet.<|end|><|assistant|>hello<|end|>", "hello<|end|>"),
    ]


FORMATS = {
    "alpaca": (ALPACA[1], "<|user|>Greet.<|end|><|assistant|>hello<|end|>", "hello<|end|>"),
    "messages": (
        {"messages": CHAT},
        "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>d<|end|>",
        "b<|end|>d<|end|>",
    ),
    "prompt_completion": ({"prompt": "2+2=", "completion": "4"}, "2+2=4<|end|>", "4<|end|>"),
    "text": ({"text": "once upon"}, "once upon<|end|>", "once upon<|end|>"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_what_the_loss_is_about(tokenizer, tmp_path, name):
    record, everything, completions = FORMATS[name]
    path = write(tmp_path / "data.jsonl", [record])
    assert spoken(tokenizer, load(tokenizer, path, format=name).train[0]) == (everything, completions)
    assert spoken(tokenizer, load(tokenizer, path, format=name, loss="all").train[0]) == (everything, everything)


def test_chats_in_other_spellings(tokenizer, tmp_path):
    sharegpt = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    row = load(tokenizer, write(tmp_path / "a.jsonl", [sharegpt]), format="messages").train[0]
    assert spoken(tokenizer, row) == ("<|user|>a<|end|><|assistant|>b<|end|>", "b<|end|>")
    chat = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    row = load(tokenizer, write(tmp_path / "b.jsonl", [chat]), format="prompt_completion").train[0]
    assert spoken(tokenizer, row)[1] == "d<|end|>"
    row = load(
        tokenizer,
        write(tmp_path / "c.jsonl", [{"q": "x", "a": "y"}]),
        columns={"instruction": "q", "output": "a"},
        system="S",
    ).train[0]
    assert spoken(tokenizer, row)[0] == "<|system|>S<|end|><|user|>x<|end|><|assistant|>y<|end|>"


def test_the_labels_of_a_chat_are_those_of_trls_assistant_masks(tmp_path):
    """SmolLM2's template, which ends each turn with a newline; TRL's own version of it marks what the assistant
    says.
    """
    from arctic_plugins_demo.model import smollm2

    tokenizer = load_tokenizer(smollm2())
    row = load(tokenizer, write(tmp_path / "a.jsonl", [{"messages": CHAT}]), format="messages").train[0]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert row["input_ids"] == whole
    assert spoken(tokenizer, row)[1] == "b<|im_end|>\nd<|im_end|>\n"


def test_dates_stay_texts(tokenizer, tmp_path):
    row = load(tokenizer, write(tmp_path / "a.jsonl", [{"instruction": "When?", "output": "2020-01-01"}])).train[0]
    assert spoken(tokenizer, row)[1] == "2020-01-01<|end|>"


def test_truncation_is_counted(tokenizer, tmp_path):
    records = [{"prompt": "p" * 4, "completion": "c" * n} for n in (2, 10, 20)] + [
        {"prompt": "p" * 30, "completion": "c"}
    ]
    data = load(tokenizer, write(tmp_path / "a.jsonl", records), format="prompt_completion", max_length=16)
    assert len(data.train) == 3
    assert vars(data.counts) == {
        "rows": 4,
        "tokens": 7 + 15 + 25 + 32,
        "truncated": 2,
        "dropped": 1,
        "cut_tokens": 9 + 16,
        "divided": 0,
        "skipped": 0,
        "reasons": [],
        "shares": {},
    }
    assert str(data.counts) == "4 rows, 79 tokens; 2 of them truncated, 25 tokens cut, 1 dropped"


def test_evaluation_rows_are_held_out_or_read(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"row {number}"} for number in range(20)])
    for size, expected in ((4, 4), (0.25, 5)):
        data = load(tokenizer, path, format="text", eval_size=size)
        texts = {spoken(tokenizer, row)[0] for part in (data.train, data.eval) for row in part}
        assert (len(data.eval), len(data.train), len(texts)) == (expected, 20 - expected, 20)
    other = write(tmp_path / "b.csv", [{"text": "other"}])
    assert [spoken(tokenizer, row)[0] for row in load(tokenizer, path, format="text", eval_path=str(other)).eval] == [
        "other<|end|>"
    ]
    with pytest.raises(DataError, match="eval_size 20 leaves none of the 20 rows"):
        load(tokenizer, path, format="text", eval_size=20)


def test_streaming_gives_the_same_rows_in_another_order(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"row {number}"} for number in range(50)])
    whole = load(tokenizer, path, format="text")
    stream = load(tokenizer, path, format="text", streaming=True, shuffle_buffer=10)
    assert isinstance(stream.train, IterableDataset)
    rows = [row["input_ids"] for row in stream.train]
    assert rows == [row["input_ids"] for row in stream.train], "a second pass is the same, so that resuming can skip"
    assert rows != whole.train["input_ids"]
    assert sorted(rows) == sorted(whole.train["input_ids"])
    assert stream.counts == whole.counts
    held = load(tokenizer, path, format="text", streaming=True, eval_size=5)
    assert (len(held.eval), len(list(held.train))) == (5, 45)


def test_options_that_contradict_each_other():
    for options, message in (
        ({"format": "text", "loss": "completion"}, "which has no completions"),
        ({"eval_size": 3, "eval_path": "x"}, "one of eval_path, eval_split and eval_size"),
        ({"eval_size": 0.1, "streaming": True}, "a number of rows as eval_size"),
    ):
        with pytest.raises(ValidationError, match=message):
            DataConfig(path="a", **options)


@pytest.mark.parametrize(
    ("name", "text", "config", "message"),
    [
        ("a.json", "", {}, "is empty"),
        ("a.json", "[]", {}, "is empty"),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": ', {}, r"a\.jsonl:2 is not valid JSON"),
        ("a.json", '[\n{"instruction": "a"},\n}]', {}, r"a\.json:3 is not valid JSON"),
        ("a.json", "[1]", {}, "record 1 is int; expected an object"),
        (
            "a.jsonl",
            '{"instruction": "a", "outptu": "b"}',
            {},
            r"a\.jsonl:1 has no 'output'; expected a string .*did you mean 'outptu'",
        ),
        ("a.jsonl", '{"instruction": "a", "output": 3}', {}, "has output=3; expected a string"),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b", "input": [1]}',
            {},
            r"input=\[1\]; expected a string, or nothing",
        ),
        ("a.csv", "instruction,output\na,b\nc\n", {}, r"a\.csv:3 does not have as many fields as the header, 2"),
        ("a.csv", 'instruction,output\n"a,b\n', {}, r"a\.csv:2 is not valid CSV"),
        (
            "a.csv",
            "question,answer\na,b\n",
            {"columns": {"instruction": "qestion"}},
            "no column 'qestion'.*did you mean 'question'",
        ),
        ("a.parquet", "PAR1 but not really", {}, "cannot be read"),
        ("a.jsonl", b"\xff\xfe\x00", {}, "is not UTF-8"),
        ("a.jsonl", '{"messages": []}', {"format": "messages"}, r"messages=\[\]; expected a list of messages"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user"}]}',
            {"format": "messages"},
            r"messages\[0\].*expected a message with 'role' and 'content'",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "x"}]}',
            {"format": "messages"},
            "no message with the role 'assistant'",
        ),
        ("a.jsonl", '{"conversations": [3, {"from": [1]}]}', {"format": "messages"}, r"conversations\[0\]=3"),
        ("a.jsonl", '{"prompt": "a"}', {"format": "prompt_completion"}, "has no 'completion'"),
        (
            "a.jsonl",
            '{"prompt": "%s", "completion": "a"}' % ("x" * 99),
            {"format": "prompt_completion", "max_length": 9},
            "raise data.max_length",
        ),
        ("a.jsonl", "[" * 99999, {}, "is not valid JSON"),
    ],
)
def test_bad_data_is_told_by_its_line(tokenizer, tmp_path, name, text, config, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as raised:
        load(tokenizer, tmp_path / name, **config)
    assert "\n" not in str(raised.value)


def test_a_template_that_refuses_says_whose_record_it_is(tokenizer, tmp_path):
    strict = load_tokenizer(tokenizer.name_or_path)
    strict.chat_template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
    with pytest.raises(DataError, match=r"a\.jsonl:1 is rejected by the model's chat template: .*the user begins"):
        load(strict, write(tmp_path / "a.jsonl", [{"messages": CHAT[1:]}]), format="messages")
    strict.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        load(strict, write(tmp_path / "b.jsonl", ALPACA))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_rows_do_not_see_each_other(tiny_checkpoint, tokenizer, tmp_path, attention):
    model, _ = load_model(tiny_checkpoint, attn_implementation=attention)
    check_packing(model)
    data = load(
        tokenizer,
        write(tmp_path / "a.jsonl", [{"text": "x" * n + "yz"} for n in (5, 9, 3, 12, 7)]),
        format="text",
        max_length=24,
    )
    packed = pack_dataset(data.train, 24, "bfd")
    assert len(packed) == 3
    batch = DataCollatorForLanguageModeling(pad_token_id=1, padding_free=True)(list(packed))
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits[
        0
    ]  # as when training
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    documents = [ids.tolist() for ids in batch["input_ids"][0].tensor_split(starts[1:])]
    assert sorted(documents) == sorted(data.train["input_ids"])
    for document, part in zip(documents, logits.tensor_split(starts[1:]), strict=True):
        torch.testing.assert_close(part, model(torch.tensor([document])).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["smollm2", "mixtral"])
def test_a_model_whose_packed_rows_see_each_other_is_refused(tmp_path, name):
    model_type, config = (LLAMA_LIKE | MIXTURES)[name]
    model, _ = load_model(tiny_model(tmp_path / "m", model_type, **config), Stack.from_dict({"fp8": {}}))
    check_packing(model)
    forward = model.forward
    model.forward = lambda input_ids, position_ids, **kwargs: forward(
        input_ids=input_ids, **kwargs
    )  # as a model that ignores positions
    with pytest.raises(ConfigError, match=r"packed rows attend to each other; try another load\.attn_implementation"):
        check_packing(model)
