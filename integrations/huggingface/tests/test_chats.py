"""What is learnt of a chat is what the assistant says, whatever the family of its template and the spelling of its
record.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import trl
from arctic_plugins_huggingface.loading.config import load_tokenizer
from arctic_plugins_huggingface.training.chats import converted, rendered, unknown_fields
from arctic_plugins_huggingface.training.counts import Limits
from arctic_plugins_huggingface.training.data import load_data, tokenized
from arctic_plugins_huggingface.training.recipe import DataConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_plugins.errors import DataError

CASES = Path(__file__).parents[4] / "shared" / "data" / "cases"


@dataclass(frozen=True)
class Family:
    """A family's template, ``templates/NAME.jinja``, written down from its documented format."""

    said: str
    """What is learnt of a turn, with ``{}`` for its words."""
    strips: bool = False
    """The template takes blanks from both ends of what is said."""
    system: bool = True
    first: bool = True
    """Takes chats that begin with the assistant."""


FAMILIES = {
    "chatml": Family("{}<|im_end|>\n"),
    "qwen2.5": Family("{}<|im_end|>\n"),
    "qwen3": Family("<think>\n\n</think>\n\n{}<|im_end|>\n"),
    "llama3": Family("{}<|eot_id|>", strips=True),
    "llama3.1": Family("{}<|eot_id|>", strips=True),
    "llama2": Family(" {} </s>", strips=True, first=False),
    "mistral": Family(" {}</s>", strips=True),
    "gemma": Family("{}<end_of_turn>\n", strips=True, system=False, first=False),
    "phi3": Family("{}<|end|>\n<|endoftext|>"),
    "phi4": Family("{}<|im_end|>"),
    "zephyr": Family("{}</s>\n"),
    "deepseek": Family("{}<EOS>"),
    "think_last": Family("<think></think>{}<|end|>"),
}


def template(name):
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text()


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture
def with_template(tokenizer):
    """A function that gives the tokenizer another template for the time of the test."""
    before = tokenizer.chat_template

    def change(template):
        tokenizer.chat_template = template
        return tokenizer

    yield change
    tokenizer.chat_template = before


def load(tokenizer, directory, records, **config):
    path = directory / "data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return load_data(DataConfig(path=str(path), **{"format": "messages", **config}), tokenizer)


def learnt_of(tokenizer, rows):
    """What counts of each row, decoded."""
    return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in rows]


def whole(tokenizer, rows):
    return [tokenizer.decode(row["input_ids"]) for row in rows]


WORDS = st.text("ab <>/|\n\"'{}%éß你", min_size=1, max_size=12).filter(str.strip)
ANSWERS = st.tuples(WORDS, st.booleans())  # and whether the turn is to be learnt


def spelled(spelling, system, exchanges):
    """The chat as a record of a format, and which of its answers are learnt."""
    learnt = [counts for _, (_, counts) in exchanges]
    turns = [
        (role, text)
        for question, (answer, _) in exchanges
        for role, text in (("user", question), ("assistant", answer))
    ]
    if spelling == "alpaca":
        *history, (question, answer) = [(question, answer) for question, (answer, _) in exchanges]
        record = {
            "instruction": question,
            "output": answer,
            "history": history,
            **({"system": system} if system else {}),
        }
        return "alpaca", record, [True] * len(exchanges)
    if spelling == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        messages = [{"from": names[role], "value": text} for role, text in turns]
        for at, counts in enumerate(learnt):
            messages[2 * at + 1]["train"] = counts
        return "messages", {"conversations": messages, **({"system": system} if system else {})}, learnt
    messages = [{"role": role, "content": text} for role, text in turns]
    before = [{"role": "system", "content": system}] if system else []
    if spelling == "prompt_completion":
        record = {"prompt": [*before, *messages[:-1]], "completion": messages[-1:]}
        return "prompt_completion", record, [False] * (len(exchanges) - 1) + [True]
    for at, counts in enumerate(learnt):
        messages[2 * at + 1]["weight"] = int(counts)
    return "messages", {"messages": [*before, *messages]}, learnt


@pytest.mark.parametrize("name", FAMILIES)
@given(
    spelling=st.sampled_from(["messages", "sharegpt", "alpaca", "prompt_completion"]),
    system=st.none() | WORDS,
    exchanges=st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=4),
)
@settings(max_examples=80, deadline=None)
def test_what_is_learnt_is_what_the_assistant_says(tokenizer, name, spelling, system, exchanges):
    family = FAMILIES[name]
    form, record, counts = spelled(spelling, system if family.system else None, exchanges)
    said = [
        answer.strip() if family.strips else answer
        for (_, (answer, _)), learnt in zip(exchanges, counts, strict=True)
        if learnt
    ]
    if name == "qwen3":
        said = [words.lstrip("\n") for words in said]
    expected = [family.said.replace("{}", words) for words in said]
    config = DataConfig(path="x", format=form)
    assert not list(unknown_fields(record, config))
    before, tokenizer.chat_template = tokenizer.chat_template, template(name)
    try:
        chat = converted(record, "here", config)
        found = rendered(chat, tokenizer, "here")
        rows = list(tokenized(chat, tokenizer, "here", config))
    finally:
        tokenizer.chat_template = before
    assert [text[begin:end] for text, spans in found for begin, end in spans] == expected
    assert "".join(learnt_of(tokenizer, rows)) == "".join(expected)
    assert whole(tokenizer, rows) == [text for text, _ in found]
    if len(found) > 1:  # each ends with the turn that it is about
        assert [text[end:] for text, [(_, end)] in found] == [""] * len(found)
    if counts[-1]:  # and the whole history stands before the last
        assert all(question.strip() in found[-1][0] for question, _ in exchanges)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.first])
def test_a_chat_that_begins_with_the_assistant(with_template, tmp_path, name):
    family = FAMILIES[name]
    chat = [
        {"role": "assistant", "content": "How can I help?"},
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "One."},
    ]
    tokenizer = with_template(template(name))
    data = load(tokenizer, tmp_path, [{"messages": chat}])
    said = "".join(learnt_of(tokenizer, data.train))
    assert "How can I help?" in said
    assert said.endswith(family.said.format("One."))
    for words in ("You are Qwen", "Today Date", "Count", "user", "system", "<BOS>"):
        assert words not in said


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {}},
    },
}
CALLED = [
    {"role": "user", "content": "The weather in Paris?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny, 21 C"},
    {"role": "assistant", "content": "It is sunny."},
]
CALLS = {
    "qwen2.5": '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n',
    "llama3.1": '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>',
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("spelling", ["openai", "sharegpt"])
def test_calls_are_learnt_and_tools_are_shown(with_template, tmp_path, name, spelling):
    family = FAMILIES[name]
    record = {"messages": CALLED, "tools": [TOOL]}
    if spelling == "sharegpt":
        values = [
            "The weather in Paris?",
            '{"name": "weather", "arguments": {"city": "Paris"}}',
            "sunny, 21 C",
            "It is sunny.",
        ]
        turns = [
            {"from": role, "value": value}
            for role, value in zip(("human", "function_call", "observation", "gpt"), values, strict=True)
        ]
        record = {"conversations": turns, "tools": json.dumps([TOOL["function"]])}
    tokenizer = with_template(template(name))
    data = load(tokenizer, tmp_path, [record])
    call = CALLS[name].removeprefix("\n") if name == "qwen2.5" else CALLS[name]
    assert "".join(learnt_of(tokenizer, data.train)) == call + family.said.format("It is sunny.")
    assert all('"description": "Weather of a city"' in text for text in whole(tokenizer, data.train))
    assert "sunny, 21 C" in whole(tokenizer, data.train)[-1]


@pytest.mark.parametrize(
    ("record", "what"), [({"messages": CALLED, "tools": [TOOL]}, "tools"), ({"messages": CALLED}, "tool_calls")]
)
@pytest.mark.parametrize("loss", ["completion", "all"])
def test_a_template_that_knows_no_tools_is_told(tokenizer, tmp_path, record, what, loss):
    with pytest.raises(DataError, match=rf"data\.jsonl:1 has {what}, which the model's chat template omits"):
        load(tokenizer, tmp_path, [record], loss=loss)


def test_thinking_that_history_leaves_out_is_learnt_turn_by_turn(with_template, tmp_path, caplog):
    """Qwen3's and DeepSeek's way: of earlier answers only what follows the thinking is shown."""
    tokenizer = with_template(template("think_history"))
    chat = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>Two and two.</think>4"},
        {"role": "user", "content": "Times 3?"},
        {"role": "assistant", "content": "<think>Four times three.</think>12"},
    ]
    data = load(tokenizer, tmp_path, [{"messages": chat}, {"messages": chat[:2]}])
    assert learnt_of(tokenizer, data.train) == [
        "<think>Two and two.</think>4<|end|>",
        "<think>Four times three.</think>12<|end|>",
        "<think>Two and two.</think>4<|end|>",
    ]
    assert whole(tokenizer, data.train)[1].startswith("<|user|>2 + 2?<|end|><|assistant|>4<|end|>")
    assert (data.counts.rows, data.counts.divided) == (3, 1)
    assert "1 chats split into one row per answer" in str(data.counts)
    load(tokenizer, tmp_path, [{"messages": chat}], eval_size=1)
    assert "may hold out some rows of a chat" in caplog.text


MARKED = sorted(
    path.stem
    for path in (Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja")
    if path.stem.split("_")[0] in ("llama3", "qwen3", "qwen2", "phi3", "gemma", "cohere2", "deepseekv3")
)


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("system", [False, True])
def test_a_template_with_marks_decides_what_is_learnt(with_template, tmp_path, name, system):
    """TRL's templates for training mark what the assistant generates."""
    tokenizer = with_template((Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text())
    chat = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Times 3?"},
        {"role": "assistant", "content": "12"},
    ]
    if system and "gemma" not in name:
        chat = [{"role": "system", "content": "Be brief."}, *chat]
    marked = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = marked["input_ids"], marked["assistant_masks"]
    assert 0 < sum(mask) < len(mask)
    data = load(tokenizer, tmp_path, [{"messages": chat}], max_length=4096)  # Cohere's prompt is long
    if len(data.train) == 1:
        assert data.train[0]["input_ids"] == ids
        assert data.train[0]["labels"] == [token if counts else -100 for token, counts in zip(ids, mask, strict=True)]
    else:  # the template renders an earlier answer differently; the last row is the chat as it stands
        assert data.train[-1]["input_ids"] == ids
    said = "".join(learnt_of(tokenizer, data.train))
    assert said.index("4") < said.index("12")
    assert "Times" not in said
    chat[-3]["train"] = False
    [only] = learnt_of(tokenizer, load(tokenizer, tmp_path, [{"messages": chat}], max_length=4096).train)
    assert "12" in only
    assert "4" not in only


def test_a_turn_is_learnt_as_far_as_it_is_marked(with_template, tmp_path):
    """Also where the template writes the turn differently once others follow, and marks no earlier turn."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think></think>"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    tokenizer = with_template(template)
    data = load(tokenizer, tmp_path, [{"messages": chat}])
    assert learnt_of(tokenizer, data.train) == ["b", "d"]
    assert data.counts.divided == 1


@pytest.mark.parametrize(
    ("record", "format", "everything", "counts"),
    [
        (
            {"system": "Be brief.", "instruction": "And in 1900?", "output": "1.6", "history": [["Now?", "8."]]},
            "alpaca",
            (
                "<|system|>Be brief.<|end|><|user|>Now?<|end|><|assistant|>8.<|end|><|user|>And in "
                "1900?<|end|><|assistant|>1.6<|end|>"
            ),
            "8.<|end|>1.6<|end|>",
        ),
        (
            {
                "system": "French.",
                "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Bonjour"}],
            },
            "messages",
            "<|system|>French.<|end|><|user|>Hello<|end|><|assistant|>Bonjour<|end|>",
            "Bonjour<|end|>",
        ),
        (
            {"system": "Not twice.", "messages": [{"role": "system", "content": "Once."}, *CALLED[:1], CALLED[3]]},
            "messages",
            "<|system|>Once.<|end|><|user|>The weather in Paris?<|end|><|assistant|>It is sunny.<|end|>",
            "It is sunny.<|end|>",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                    {"role": "assistant", "content": "c"},
                ]
            },
            "messages",
            "<|user|>ab<|end|><|assistant|>c<|end|>",
            "c<|end|>",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "bad", "train": False},
                    {"from": "human", "value": "c"},
                    {"from": "gpt", "value": "good", "train": True},
                ]
            },
            "messages",
            "<|user|>a<|end|><|assistant|>bad<|end|><|user|>c<|end|><|assistant|>good<|end|>",
            "good<|end|>",
        ),
        (
            {"prompt": CALLED[:1], "completion": [{"role": "assistant", "content": "x"}]},
            "prompt_completion",
            "<|user|>The weather in Paris?<|end|><|assistant|>x<|end|>",
            "x<|end|>",
        ),
    ],
    ids=["alpaca", "system", "system twice", "parts", "train", "prompt and completion"],
)
def test_fields_of_the_formats_are_honoured(tokenizer, tmp_path, caplog, record, format, everything, counts):
    data = load(tokenizer, tmp_path, [record], format=format)
    assert (whole(tokenizer, data.train), learnt_of(tokenizer, data.train)) == ([everything], [counts])
    assert "does not use" not in caplog.text


def test_turns_that_are_not_to_be_learnt_of(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    data = load(tokenizer, tmp_path, [{"messages": chat}, {"messages": [*chat, *CALLED[:1], CALLED[3]]}])
    assert learnt_of(tokenizer, data.train) == ["It is sunny.<|end|>"]
    assert (data.counts.rows, data.counts.dropped) == (2, 1)


def test_fields_that_nobody_uses_are_named_once(tokenizer, tmp_path, caplog):
    rows = [
        {
            "messages": [{"role": "user", "content": "a", "mood": "good"}, {"role": "assistant", "content": "b"}],
            "source": "here",
            "id": number,
        }
        for number in range(1, 4)
    ]
    load(tokenizer, tmp_path, rows)
    told = [record.getMessage() for record in caplog.records if "does not use" in record.getMessage()]
    assert [text.split("data.jsonl", 1)[1] for text in told] == [
        ":1 has fields that the format 'messages' does not use: id, messages[].mood, source"
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "a part of type 'image_url'; expected",
        ),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "weight=0.5 .*expected weight 0 or 1"),
        ({"messages": [{"role": "assistant", "content": "a", "train": "no"}]}, "train='no'; expected"),
        ({"messages": [{"role": "assistant"}]}, "expected a message with 'role' and 'content'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
            "with the call .*expected a function call",
        ),
        ({"conversations": [{"from": "function_call", "value": "weather()"}]}, "which is not valid JSON"),
        ({"messages": CALLED, "tools": "[1]"}, "has tools='\\[1\\]'; expected a list of functions"),
        ({"messages": CALLED, "system": ["x"]}, "has system=.*expected a string"),
        (
            {"prompt": CALLED[:1], "completion": CALLED[:1]},
            "has no message with the role 'assistant' in its completion",
        ),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "has history=.*expected a list of pairs"),
    ],
)
def test_fields_that_are_wrong_are_told(tokenizer, tmp_path, record, message):
    spelling = "alpaca" if "output" in record else "prompt_completion" if "prompt" in record else "messages"
    with pytest.raises(DataError, match=message) as raised:
        load(tokenizer, tmp_path, [record], format=spelling)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("case", "rows", "said"),
    [
        ("think_block_last_turn", 2, ["<think></think><b>one</b><|end|>", "<think></think>two<|end|>"]),
        ("thinking_template", 2, ["<think>Two and two.</think>4<|end|>", "<think>Four times three.</think>12<|end|>"]),
        ("turn_weights", 1, ["good answer<|end|>"]),
        ("starts_with_assistant", 1, ["How can I help?<|end|>One.<|end|>"]),
        ("content_parts", 1, ["The Loire.<|end|>"]),
    ],
)
def test_small_inputs_that_failed(with_template, tokenizer, case, rows, said):
    if not (CASES / case).is_dir():
        pytest.skip(f"{CASES / case} is not here")
    own = CASES / case / "chat_template.jinja"
    with_template(own.read_text() if own.is_file() else tokenizer.chat_template)
    data = load_data(DataConfig(path=str(CASES / case / "data.jsonl"), format="messages"), tokenizer)
    assert learnt_of(tokenizer, data.train) == said
    assert len(data.train) == rows


def test_small_inputs_with_tools_that_failed(with_template):
    if not CASES.is_dir():
        pytest.skip(f"{CASES} is not here")
    tokenizer = with_template(template("qwen2.5"))
    for case in ("tool_calls", "fields_beside_the_chat"):
        data = load_data(DataConfig(path=str(CASES / case / "data.jsonl"), format="messages"), tokenizer)
        assert all("<tool_call>" in text or "Bonjour" in text for text in learnt_of(tokenizer, data.train))
    data = load_data(DataConfig(path=str(CASES / "fields_beside_the_chat" / "alpaca.jsonl")), tokenizer)
    assert learnt_of(tokenizer, data.train) == ["8 billion.<|im_end|>\n1.6 billion.<|im_end|>\n"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_longer_than_the_positions_is_told(tokenizer, tmp_path, streaming):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": "x" * length}) for length in (10, 40)))
    config = {"path": str(tmp_path / "data.jsonl"), "format": "text", "streaming": streaming}
    with pytest.raises(
        DataError,
        match=r"data\.jsonl:2 has 41 tokens, but the model has 32 positions; expected data\.max_length of at most 32",
    ):
        list(load_data(DataConfig(**config), tokenizer, limits=Limits(positions=32)).train)
    assert len(list(load_data(DataConfig(**config, max_length=32), tokenizer, limits=Limits(positions=32)).train)) == 2


def test_tokens_without_an_embedding_are_told(tokenizer, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "abc"}')
    config = DataConfig(path=str(tmp_path / "data.jsonl"), format="text")
    largest = max(load_data(config, tokenizer, limits=Limits(embeddings=10**6)).train["input_ids"][0])
    load_data(config, tokenizer, limits=Limits(embeddings=largest + 1))
    with pytest.raises(
        DataError,
        match=rf"no embedding for 2 of the tokens in the data: 'b' \({largest - 1}\), 'c' \({largest}\), first at "
        rf".*data\.jsonl:1; expected tokens below {largest - 1}; list them under data\.new_tokens",
    ):
        load_data(config, tokenizer, limits=Limits(embeddings=largest - 1))
