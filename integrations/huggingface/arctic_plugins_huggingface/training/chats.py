"""Chats: convert records of each format to messages, render them as texts, and locate the model's turns in the texts.

The formats follow Alpaca, ShareGPT, OpenAI and LLaMA-Factory (``data/README.md``, 0.9), the templates transformers
5.19.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import commonprefix
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from arctic_plugins.errors import DataError, one_line, suggest
from arctic_plugins_huggingface.generate import chat
from arctic_plugins_huggingface.training.recipe import DataSource

__all__ = ["KNOWN", "Record", "Spans", "converted", "prompted", "rendered", "unknown_fields"]

Record = dict[str, Any]
Spans = list[tuple[int, int]]
"""Character ranges ``[begin, end)`` of a text that the model is trained to produce."""

KNOWN: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "messages": ("messages", "conversations", "system", "tools"),
    "prompt_completion": ("prompt", "completion", "tools"),
    "text": ("text",),
    "preference": ("prompt", "messages", "conversations", "chosen", "rejected", "completion", "label", "tools"),
}
"""Format -> the record fields that it uses."""
_KNOWN_OF_MESSAGES = (
    *("role", "content", "from", "value", "tool_calls", "tool_call_id", "name", "weight", "train"),
    *("reasoning_content", "reasoning", "thinking"),  # used if the template reads them
)
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_CALL = "function_call"
_TAIL = 8
"""Number of trailing characters that identify the end of a prompt."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def unknown_fields(record: Record, source: DataSource) -> Iterator[str]:
    """Yield the names of fields of the record, and of its messages, that are not used."""
    used = {*KNOWN[source.format], *source.columns, *source.columns.values()}
    yield from (str(name) for name, value in record.items() if name not in used and value not in (None, ""))
    for key in ("messages", "conversations", "prompt", "completion", "chosen", "rejected"):
        for message in record[key] if key in KNOWN[source.format] and isinstance(record.get(key), list) else ():
            if isinstance(message, Mapping):
                unknown = (
                    name for name, value in message.items() if name not in _KNOWN_OF_MESSAGES and value is not None
                )
                yield from (f"{key}[].{name}" for name in unknown)


def converted(record: Record, where: str, source: DataSource) -> Record:
    """Return the content of ``record`` in a form that does not depend on the format.

    This is one of: ``text``; ``prompt`` and ``completion``, both strings; a chat with ``messages`` for a template,
    ``learnt`` (for each message, whether the model is trained to produce it) and ``tools`` (None if there are none); or
    a preference with ``prompt``, ``tools``, and either ``chosen`` and ``rejected`` or ``completion`` and ``label``,
    where texts are all strings or all lists of messages.

    Raises:
        DataError: if a field is missing or has the wrong type; the message names ``where`` and the field.
    """
    return _CONVERT[source.format](record, where, source)


def _text(record: Record, key: str, where: str, source: DataSource) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        fix = (
            "correct the record"
            if key in record
            else f"{suggest(key, map(str, record))}; data.columns: {{{key}: ...}} maps it to a column"
        )
        found = f"{key}={value!r}" if key in record else f"no '{key}'"
        raise DataError(f"{where} has {found}", expected=f"a string under '{key}' (format {source.format})", fix=fix)
    return value


def _optional_text(record: Record, key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value or "", str):
        raise DataError(f"{where} has {key}={value!r}", expected="a string, or nothing", fix="correct the record")
    return value or ""


def _alpaca(record: Record, where: str, source: DataSource) -> Record:
    """Convert an Alpaca record to a chat.

    The user's message is the instruction, a blank line and the input (if any); the assistant's message is the output.
    The assistant's messages in the history are trained on as well.
    """
    instruction, output = (_text(record, key, where, source) for key in ("instruction", "output"))
    question = "\n\n".join(part for part in (instruction, _optional_text(record, "input", where)) if part)
    history = record.get("history") or []
    if not isinstance(history, list) or not all(_is_exchange(exchange) for exchange in history):
        raise DataError(
            f"{where} has history={history!r}",
            expected="a list of pairs of strings: question, answer",
            fix="correct the record",
        )
    system = _optional_text(record, "system", where) or source.system
    messages = chat("", system)[:-1]
    for asked, answered in [*history, (question, output)]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"messages": messages, "learnt": [message["role"] == "assistant" for message in messages], "tools": None}


def _is_exchange(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _chat(record: Record, where: str, source: DataSource) -> Record:
    key = "conversations" if "messages" not in record and isinstance(record.get("conversations"), list) else "messages"
    messages, learnt = _messages(record.get(key), key, where, source)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{where} has no message with the role 'assistant'",
            expected="at least one message to train on",
            fix="correct or remove the record",
        )
    system = _optional_text(record, "system", where)
    if system and messages[0]["role"] != "system":
        messages, learnt = [{"role": "system", "content": system}, *messages], [False, *learnt]
    return {"messages": messages, "learnt": learnt, "tools": _tools(record, where)}


def _prompt_completion(record: Record, where: str, source: DataSource) -> Record:
    if not isinstance(record.get("prompt"), list):
        return {key: _text(record, key, where, source) for key in ("prompt", "completion")}
    prompt, _ = _messages(record.get("prompt"), "prompt", where, source)
    completion, learnt = _messages(record.get("completion"), "completion", where, source)
    if not any(message["role"] == "assistant" for message in completion):
        raise DataError(
            f"{where} has no message with the role 'assistant' in its completion",
            expected="at least one message to train on",
            fix="correct or remove the record",
        )
    return {
        "messages": [*prompt, *completion],
        "learnt": [*[False] * len(prompt), *learnt],
        "tools": _tools(record, where),
    }


def _preference(record: Record, where: str, source: DataSource) -> Record:
    """Convert a preference; messages at the beginning of both answers are the prompt, if the record has no other."""
    keys = ("completion",) if "completion" in record and "chosen" not in record else ("chosen", "rejected")
    key = next((key for key in ("prompt", "messages", "conversations") if isinstance(record.get(key), list)), "prompt")
    answers = [[value] if isinstance(value := record.get(name), Mapping) else value for name in keys]
    label: Record = {}
    if keys == ("completion",):
        label = {"label": record.get("label")}
        if not isinstance(label["label"], bool):
            raise DataError(f"{where} has label={label['label']!r}", expected="true or false", fix="correct the record")
    if not any(isinstance(answer, list) for answer in answers):
        return {name: _text(record, name, where, source) for name in ("prompt", *keys)} | label | {"tools": None}
    chats = [_messages(answer, name, where, source)[0] for name, answer in zip(keys, answers, strict=True)]
    shared = 0
    if isinstance(record.get(key), list):
        prompt, _ = _messages(record[key], key, where, source)
    else:  # as in UltraFeedback: a string under 'prompt' is the question with which both answers begin
        while shared < min(map(len, chats)) - 1 and all(one[shared] == chats[0][shared] for one in chats):
            shared += 1
        prompt = chats[0][:shared] if len(chats) > 1 else []
        if not prompt and isinstance(record.get("prompt"), str):
            prompt = chat(record["prompt"])
        if not prompt:
            raise DataError(
                f"{where} has no '{key}', and its answers do not begin with the same message",
                expected="a list of messages under 'prompt'",
                fix="correct the record",
            )
    answered = {name: messages[shared:] for name, messages in zip(keys, chats, strict=True)}
    for name, messages in answered.items():
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(
                f"{where} has no message with the role 'assistant' in '{name}'",
                expected="an answer of the model",
                fix="correct or remove the record",
            )
    return {"prompt": prompt, **answered, **label, "tools": _tools(record, where)}


def _plain(record: Record, where: str, source: DataSource) -> Record:
    return {"text": _text(record, "text", where, source)}


_CONVERT: dict[str, Callable[[Record, str, DataSource], Record]] = {
    "alpaca": _alpaca,
    "messages": _chat,
    "prompt_completion": _prompt_completion,
    "text": _plain,
    "preference": _preference,
}


def _messages(value: Any, key: str, where: str, source: DataSource) -> tuple[list[Record], list[bool]]:
    """Return the messages as templates expect them and, for each, whether the model is trained to produce it."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where} has {key}={value!r}",
            expected=f"a list of messages under '{key}' (format {source.format})",
            fix="correct the record",
        )
    messages, learnt = [], []
    for at, given in enumerate(value):
        here = f"{where} has {key}[{at}]"
        message = _message(given, here)
        weight, train = given.get("weight"), given.get("train")
        if weight not in (None, 0, 1) or train not in (None, False, True):
            raise DataError(
                f"{here} with weight={weight!r} and train={train!r}",
                expected="weight 0 or 1, train false or true",
                fix="correct it",
            )
        messages.append(message)
        learnt.append(message["role"] == "assistant" and weight != 0 and train is not False)
    return messages, learnt


def _message(given: Any, here: str) -> Record:
    wrong = DataError(
        f"{here}={given!r}", expected="a message with 'role' and 'content', both strings", fix="correct the record"
    )
    if not isinstance(given, Mapping):
        raise wrong
    if "from" in given:  # ShareGPT
        given = {**given, "role": _SHAREGPT_ROLES.get(str(given["from"]), given["from"]), "content": given.get("value")}
        if given["role"] == _CALL:
            given = {**given, "role": "assistant", "content": None, "tool_calls": _parsed(given.get("value"), here)}
    left_out = ("from", "value", "weight", "train")
    message = {key: value for key, value in given.items() if value is not None and key not in left_out}
    if not isinstance(message.get("role"), str):
        raise wrong
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = _calls(calls, here)
    content = message.get("content", "" if calls else None)
    if isinstance(content, list):
        content = "".join(_part(part, here) for part in content)
    if not isinstance(content, str):
        raise wrong
    return {**message, "content": content}


def _part(part: Any, here: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise DataError(f"{here} with a part of type {kind!r}", expected="parts of type 'text'", fix="remove it")
    return str(part["text"])


def _parsed(text: Any, here: str) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError as error:
        raise DataError(
            f"{here}={text!r}, which is not valid JSON: {error}", expected="a function call", fix="correct the record"
        ) from error


def _calls(value: Any, here: str) -> list[Record]:
    """Return calls as transformers' templates expect them: ``function`` with ``name`` and an ``arguments`` object."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{here} with the call {call!r}",
                expected="a function call with a 'name' and 'arguments'",
                fix="correct the record",
            )
        arguments = function.get("arguments", {})
        outer = {key: call[key] for key in ("id", "type") if call.get(key) is not None}
        calls.append(
            {"type": "function", **outer, "function": {"name": function["name"], "arguments": _parsed(arguments, here)}}
        )
    return calls


def _tools(record: Record, where: str) -> list[Record] | None:
    """Return the functions that the model may call, as JSON schemas; None if there are none."""
    given = record.get("tools")
    tools = _parsed(given or None, f"{where} has tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(
        isinstance(tool, Mapping) and isinstance(_name(tool), str) for tool in tools
    ):
        raise DataError(
            f"{where} has tools={given!r}", expected="a list of functions, each with a 'name'", fix="correct the record"
        )
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def _name(tool: Mapping[str, Any]) -> Any:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, Mapping) else None


# Rendering with the chat template.


def rendered(
    row: Record, tokenizer: PreTrainedTokenizerBase, where: str, *, everything: bool = False
) -> list[tuple[str, Spans]]:
    """Render the chat in ``row`` with its template, and locate the model's turns in the text.

    The result is one text if the template only appends from turn to turn. Some templates render a turn differently
    once others follow it: they omit its thinking, or put an empty thinking block before the last answer only. The
    result is then one text for each turn that is trained on. It ends with that turn, rendered as it is when the model
    produces it. The trained part of a turn is everything between the prompt for it and its end: its words, its calls,
    and the token that ends it. In a template with ``{% generation %}`` marks, it is what is marked instead.

    Args:
        row: see :func:`converted`.
        tokenizer: must have a chat template.
        where: where the record is, for error messages.
        everything: return one text and no spans.

    Raises:
        DataError: if the template rejects the chat, omits its tools or calls, or does not show where a turn begins.
    """
    messages, learnt, tools = row["messages"], row["learnt"], row["tools"]

    def render(messages: list[Record], tools: list[Record] | None = tools, **options: Any) -> str | None:
        """Return None if the template, which is a program, fails: many reject certain roles or orders of roles."""
        try:
            given = cast("list[Record | Callable[..., Any]] | None", tools)
            return str(tokenizer.apply_chat_template(messages, tools=given, tokenize=False, **options))
        except Exception as error:
            refusals.append(error)
            return None

    refusals: list[Exception] = []
    whole = render(messages)
    texts = {
        at: whole if at == len(messages) - 1 else render(messages[: at + 1])
        for at in range(len(messages))
        if learnt[at] and not everything
    }
    if whole is None or None in texts.values():
        raise _rejected(where, refusals[0])
    if tools and render(messages, None) == whole:
        raise _left_out("tools", where)
    if (
        any("tool_calls" in message for message in messages)
        and render([_without_calls(message) for message in messages]) == whole
    ):
        raise _left_out("tool_calls", where)
    if everything:
        return [(whole, [])]
    turns: list[tuple[str, Spans]] = []
    for at, text in texts.items():
        turn = _turn(str(text), messages[:at], messages[at], render)
        if turn is None:
            raise DataError(
                f"{where}: the chat template does not show where turn {at + 1} begins",
                fix="set data.loss to 'all', or remove the record",
            )
        ended, begin = turn
        spans = [(begin, len(ended))]
        if (marks := _marks(messages[: at + 1], tools, tokenizer)) is not None:
            shift = len(ended) - len(str(text))
            spans = [(start + shift, end + shift) for start, end in marks if end + shift > begin]
        turns.append((ended, spans))
    if all(whole.startswith(text) for text, _ in turns):
        return [(whole, [span for _, spans in turns for span in spans])] if turns else []
    return turns


def prompted(messages: list[Record], tools: list[Record] | None, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """Render ``messages`` with the prompt for the model's next turn.

    Raises:
        DataError: if the template rejects them.
    """
    try:
        given = cast("list[Record | Callable[..., Any]] | None", tools)
        return str(tokenizer.apply_chat_template(messages, tools=given, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program
        raise _rejected(where, error) from error


def _rejected(where: str, error: Exception) -> DataError:
    return DataError(
        f"{where} is rejected by the model's chat template: {one_line(error)}", fix="correct or remove the record"
    )


def _marks(messages: list[Record], tools: list[Record] | None, tokenizer: PreTrainedTokenizerBase) -> Spans | None:
    """Return what the template marks as the assistant's in ``messages``; None if it has no marks."""
    template = tokenizer.get_chat_template(None, cast("list[dict[str, str]] | None", tools))
    if not _GENERATION.search(template):
        return None
    # apply_chat_template returns the marks only as a mask of tokens.
    options: dict[str, Any] = {"tools": tools, **tokenizer.special_tokens_map}
    found: Any = render_jinja_template([messages], chat_template=template, return_assistant_tokens_mask=True, **options)
    _, [spans] = found  # the declared type is that of the text alone
    return cast("Spans", spans)


def _turn(
    text: str, before: Sequence[Record], message: Record, render: Callable[..., str | None]
) -> tuple[str, int] | None:
    """Return ``text``, which ends with ``message``, and where the model's part begins: after the prompt for this turn.

    If ``text`` does not begin with the prompt, the message is rendered with two different contents, and the results
    are compared to find where its content begins. If the content follows the prompt's last characters, the prompt
    replaces what the template renders in its place afterwards (Mistral's template includes the system message only
    while a question comes last). Otherwise, the prompt and the text diverge at this turn (DeepSeek's prompt begins the
    thinking, and its history shows none), or there is no prompt (a chat that begins with the assistant).

    Return None if different contents make no difference.
    """
    prompt = render(before, add_generation_prompt=True) if before else None
    if prompt and text.startswith(prompt):
        return text, len(prompt)
    one, other = (render([*before, {**message, "content": sign + message["content"]}]) for sign in ("\u2460", "\u2461"))
    if one is None or other is None or one == other:
        return None
    begin = _common(one, other)
    if not prompt:
        return text, begin
    tail = prompt[-_TAIL:]
    end = text.rfind(tail, 0, begin) + len(tail)
    if end >= len(tail) and not text[end:begin].strip():
        return prompt + text[end:], len(prompt)
    history = render(before)
    parting = _common(text, prompt)
    return text, min(begin, parting) if history and text.startswith(history) and parting >= len(history) else begin


def _without_calls(message: Record) -> Record:
    return {key: value for key, value in message.items() if key != "tool_calls"}


def _left_out(what: str, where: str) -> DataError:
    return DataError(
        f"{where} has {what}, which the model's chat template omits",
        expected="a template that renders them",
        fix="use a model that was trained to call functions, set data.chat_template, or remove them from the data",
    )


def _common(text: str, other: str) -> int:
    """Return the length of the prefix that two texts share."""
    return len(commonprefix([text, other]))  # noqa: RUF071 - these are texts, not paths
