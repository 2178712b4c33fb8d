"""From data files to the prompt-completion rows that TRL trains on; tokenizing, masking and collating are TRL's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from arctic_plugins.errors import DataError
from arctic_plugins_huggingface.recipe import DataConfig

__all__ = ["alpaca_messages", "chat", "load_rows"]


def alpaca_messages(record: Mapping[str, Any], system: str | None = None) -> dict[str, list[dict[str, str]]]:
    """One Alpaca record as a chat: the user says instruction, blank line, input (if any); the assistant says output."""
    question = "\n\n".join(part for part in (record["instruction"], record.get("input") or "") if part)
    return {"prompt": chat(question, system), "completion": [{"role": "assistant", "content": record["output"]}]}


def chat(question: str, system: str | None = None) -> list[dict[str, str]]:
    """What the model is asked: a system message, if any, and the user's."""
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question}]


def load_rows(config: DataConfig) -> Dataset:
    """Read and convert the data; columns ``prompt`` and ``completion`` hold chat messages, so loss falls on completions only.

    Raises:
        DataError: absent, empty, malformed (with the line), or a record that lacks a key; names the record.
    """
    records = _read(Path(config.path))
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise DataError(f"{config.path}: record {number} is {type(record).__name__}", expected="an object")
        for key in ("instruction", "output"):
            if not isinstance(record.get(key), str):
                raise DataError(f"{config.path}: record {number} has {key}={record.get(key)!r}", expected=f"a text under '{key}' (format alpaca)")
    return Dataset.from_list([alpaca_messages(record, config.system) for record in records])


def _read(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.path {path} cannot be read: {error}", expected="a JSON or JSONL file", fix="correct data.path") from error
    if not text.strip():
        raise DataError(f"data.path {path} is empty", expected="at least one record")
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON: {error}") from error
    else:
        records = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except ValueError as error:
                    raise DataError(f"{path}:{number} is not valid JSON: {error}", fix="correct or remove the line") from error
    if not records:
        raise DataError(f"data.path {path} holds no record", expected="at least one")
    return records
