"""From data files to rows of tokens and labels; cutting, packing, collating are TRL's.

Reading is ours because a file with a bad line must be told by that line: pyarrow's JSON reader, behind ``datasets.load_dataset``, names blocks
and infers types (a column of dates becomes timestamps).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DownloadConfig, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase

from arctic_plugins.errors import DataError, suggest
from arctic_plugins_huggingface.checkpoints import hub_trouble, reason
from arctic_plugins_huggingface.generation import Messages, chat
from arctic_plugins_huggingface.recipe import DataConfig

__all__ = ["DataCounts", "TrainingData", "alpaca_messages", "load_data"]

Record = dict[str, Any]
_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
_BATCH = 1000
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass
class DataCounts:
    """What became of the rows; a stream counts while it is read."""

    rows: int = 0
    tokens: int = 0
    """Before cutting."""
    truncated: int = 0
    """Rows longer than ``max_length``."""
    dropped: int = 0
    """Rows of which the loss would see nothing within ``max_length``."""
    cut_tokens: int = 0

    def __str__(self) -> str:
        cut = f"; {self.truncated} of them truncated, {self.cut_tokens:,} tokens cut, {self.dropped} dropped" if self.truncated + self.dropped else ""
        return f"{self.rows:,} rows, {self.tokens:,} tokens{cut}"


@dataclass(frozen=True)
class TrainingData:
    """Rows with ``input_ids`` and ``labels`` (-100 where no loss is), uncut."""

    train: Dataset | IterableDataset
    eval: Dataset | None
    counts: DataCounts
    """Of the training rows and what was held out of them."""
    eval_counts: DataCounts | None = None
    """Of evaluation rows with a source of their own."""


def alpaca_messages(record: Mapping[str, Any], system: str | None = None) -> dict[str, Messages]:
    """One Alpaca record as a chat: the user says instruction, blank line, input (if any); the assistant says output."""
    question = "\n\n".join(part for part in (record["instruction"], record.get("input") or "") if part)
    return {"prompt": chat(question, system), "completion": [{"role": "assistant", "content": record["output"]}]}


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, keep_end: bool = False) -> TrainingData:
    """Read, check and tokenize the training data and, if any, the evaluation data.

    Args:
        config: what to read.
        tokenizer: with a chat template, unless the data are texts.
        seed: of the choice of rows that are held out, and of a stream's order.
        keep_end: count what is lost for ``training.truncation_mode: keep_end``.

    Raises:
        DataError: absent, empty, malformed (with the line), a record that lacks a column or holds another type (named), rows that all lose their
            labels when they are cut, or a tokenizer that lacks what the format needs.
    """
    if config.format in ("alpaca", "messages") and tokenizer.chat_template is None:
        raise DataError(
            f"data.format is '{config.format}', and the model's tokenizer has no chat template",
            expected="a chat model",
            fix="set tokenizer.chat_template and save it, or use the format prompt_completion",
        )
    if config.loss == "completion" and config.format != "text" and not tokenizer.is_fast:
        raise DataError(
            f"the model's tokenizer ({type(tokenizer).__name__}) does not tell which characters a token stands for",
            expected="one that does, for data.loss 'completion'",
            fix="set data.loss to 'all'",
        )
    counts, evaluation, eval_counts = DataCounts(), None, None
    if config.eval_path is not None or config.eval_split is not None:
        eval_counts = DataCounts()
        other = {"path": config.eval_path or config.path, "split": config.eval_split or config.split, "streaming": False}
        evaluation = _table(_rows(config.model_copy(update=other), tokenizer, eval_counts, keep_end), config, eval_counts)
    if config.streaming:
        check_first = next(_rows(config, tokenizer, DataCounts(), keep_end))  # an error in the first row is said before weights are read
        assert check_first.keys() == {"input_ids", "labels"}
        held_out = config.eval_size if isinstance(config.eval_size, int) else 0
        if held_out:
            evaluation = _table(islice(_rows(config, tokenizer, DataCounts(), keep_end), held_out), config, DataCounts(rows=held_out))

        def read() -> Iterator[dict[str, list[int]]]:
            vars(counts).update(vars(DataCounts()))  # each pass counts anew
            return islice(_rows(config, tokenizer, counts, keep_end), held_out, None)

        stream = IterableDataset.from_generator(read)
        return TrainingData(stream.shuffle(seed=seed, buffer_size=config.shuffle_buffer), evaluation, counts, eval_counts)
    train = _table(_rows(config, tokenizer, counts, keep_end), config, counts)
    if config.eval_size is not None:
        if len(train) < 2 or (isinstance(config.eval_size, int) and config.eval_size >= len(train)):
            raise DataError(f"data.eval_size {config.eval_size} leaves none of {len(train)} rows to train on", fix="lower it")
        parts = train.train_test_split(test_size=config.eval_size, seed=seed)
        train, evaluation = parts["train"], parts["test"]
    return TrainingData(train, evaluation, counts, eval_counts)


def _table(rows: Iterator[dict[str, list[int]]], config: DataConfig, counts: DataCounts) -> Dataset:
    batches = []
    while batch := list(islice(rows, _BATCH)):
        batches.append(pa.RecordBatch.from_pylist(batch, schema=_SCHEMA))
    if counts.dropped == counts.rows:
        raise DataError(
            f"no row of {config.path} has anything left for the loss within data.max_length {config.max_length}",
            expected="rows whose completion begins earlier",
            fix=f"raise data.max_length (mean row: {counts.tokens // counts.rows} tokens)",
        )
    return Dataset(pa.Table.from_batches(batches, schema=_SCHEMA))


def _rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase, counts: DataCounts, keep_end: bool) -> Iterator[dict[str, list[int]]]:
    """Tokenize one record after another, and count what cutting will take; rows with nothing left for the loss are dropped here."""
    window = slice(-config.max_length, None) if keep_end else slice(None, config.max_length)
    splits = config.format == "text" and config.packing  # documents are split, not cut
    for where, record in _records(config):
        row = _tokenized(_CONVERT[config.format](record, where, config), tokenizer, where, config)
        length = len(row["input_ids"])
        counts.rows += 1
        counts.tokens += length
        if not splits and length > config.max_length:
            counts.truncated += 1
            counts.cut_tokens += length - config.max_length
        if all(label == -100 for label in row["labels"][slice(None) if splits else window]):
            counts.dropped += 1
            continue
        yield row


def _records(config: DataConfig) -> Iterator[tuple[str, Record]]:
    """(where, record); ``where`` is what an error says: file and line, or file and record."""
    records = _file_records(Path(config.path)) if Path(config.path).is_file() else _hub_records(config)
    empty = True
    for where, record in records:
        empty = False
        if not isinstance(record, dict):
            raise DataError(f"{where} is {type(record).__name__}", expected="an object", fix="correct or remove it")
        for key, column in config.columns.items():
            if column not in record:
                raise DataError(f"{where} has no column '{column}' (data.columns.{key})", fix=suggest(column, map(str, record)))
            record = {**record, key: record[column]}
        yield where, record
    if empty:
        raise DataError(f"data.path {config.path} is empty", expected="at least one record", fix="correct data.path")


def _file_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        if path.suffix in (".csv", ".tsv"):
            yield from _csv_records(path)
        elif path.suffix == ".parquet":
            number = 0
            for batch in pq.ParquetFile(path).iter_batches(_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: record {number}", record
        else:
            yield from _json_records(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}", fix="save it as UTF-8") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data.path {path} cannot be read: {reason(error)}", expected="a whole file of the kind that its name says") from error


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(_BATCH).lstrip()
        file.seek(0)
        if start.startswith("["):
            try:
                records = json.load(file)
            except (ValueError, RecursionError) as error:
                line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
                raise DataError(f"{path}{line} is not valid JSON: {error}", fix="correct the line") from error
            yield from ((f"{path}: record {number}", record) for number, record in enumerate(records, 1))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number} is not valid JSON: {error}", fix="correct or remove the line") from error
                yield f"{path}:{number}", record


def _csv_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for record in reader:
                where = f"{path}:{reader.line_num}"
                if None in record or None in record.values():
                    raise DataError(f"{where} has another number of fields than the header's {len(reader.fieldnames or ())}", fix="correct the line")
                yield where, record
        except csv.Error as error:
            raise DataError(f"{path}:{reader.reader.line_num} is not valid CSV: {error}", fix="correct the line") from error


def _hub_records(config: DataConfig) -> Iterator[tuple[str, Any]]:
    trouble = hub_trouble()
    options = {} if trouble is None else {"download_config": DownloadConfig(local_files_only=True)}
    try:
        dataset = load_dataset(config.path, config.name, split=config.split, streaming=config.streaming, **options)
    except Exception as error:  # datasets raises its own, the hub's, httpx's and the builder's
        raise DataError(
            f"data.path {config.path} is no file here and cannot be loaded as a dataset: {trouble or reason(error)}",
            expected="a file, or the id of a dataset that can be reached",
            fix="correct data.path, data.name or data.split",
        ) from error
    yield from ((f"{config.path}: row {number}", dict(record)) for number, record in enumerate(dataset, 1))


def _text(record: Record, key: str, where: str, config: DataConfig) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        fix = "correct the record" if key in record else f"{suggest(key, map(str, record))}; data.columns: {{{key}: ...}} renames"
        found = f"{key}={value!r}" if key in record else f"no '{key}'"
        raise DataError(f"{where} has {found}", expected=f"a text under '{key}' (format {config.format})", fix=fix)
    return value


def _messages(value: Any, key: str, where: str, config: DataConfig) -> Messages:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where} has {key}={value!r}", expected=f"a list of messages under '{key}' (format {config.format})", fix="correct the record"
        )
    for at, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(
                f"{where} has {key}[{at}]={message!r}", expected="a message with 'role' and 'content', both texts", fix="correct the record"
            )
    return value


def _alpaca(record: Record, where: str, config: DataConfig) -> Record:
    for key in ("instruction", "output"):
        _text(record, key, where, config)
    if not isinstance(record.get("input") or "", str):
        raise DataError(f"{where} has input={record['input']!r}", expected="a text, or none", fix="correct the record")
    return alpaca_messages(record, config.system)


def _chat(record: Record, where: str, config: DataConfig) -> Record:
    if "messages" not in record and isinstance(record.get("conversations"), list):
        record = {"messages": [_from_sharegpt(message) for message in record["conversations"]]}
    messages = _messages(record.get("messages"), "messages", where, config)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where} has no message of the role 'assistant'", expected="something to learn", fix="correct or remove the record")
    return {"messages": messages}


def _from_sharegpt(message: Any) -> Any:
    if not isinstance(message, Mapping) or "from" not in message:
        return message
    return {"role": _SHAREGPT_ROLES.get(str(message["from"]), message["from"]), "content": message.get("value")}


def _prompt_completion(record: Record, where: str, config: DataConfig) -> Record:
    if isinstance(record.get("prompt"), list):
        return {key: _messages(record.get(key), key, where, config) for key in ("prompt", "completion")}
    return {key: _text(record, key, where, config) for key in ("prompt", "completion")}


def _plain(record: Record, where: str, config: DataConfig) -> Record:
    return {"text": _text(record, "text", where, config)}


_CONVERT: dict[str, Callable[[Record, str, DataConfig], Record]] = {
    "alpaca": _alpaca,
    "messages": _chat,
    "prompt_completion": _prompt_completion,
    "text": _plain,
}


def _tokenized(row: Record, tokenizer: PreTrainedTokenizerBase, where: str, config: DataConfig) -> dict[str, list[int]]:
    """Tokens and labels of one row. A token counts if its characters overlap what the model is to say."""
    chats = isinstance(row.get("messages") or row.get("completion"), list)
    if chats:
        text, spans = _rendered(row, tokenizer, where)
    elif "text" in row:
        text, spans = row["text"], [(0, len(row["text"]))]
    else:
        text = row["prompt"] + row["completion"]
        spans = [(len(row["prompt"]), len(text))]
    everything = config.loss == "all" or "text" in row
    encoded = tokenizer(text, add_special_tokens=not chats, return_offsets_mapping=not everything, verbose=False)
    ids = list(encoded["input_ids"])
    if everything:
        labels = list(ids)
    else:
        labels = [
            token if any(begin < end and start < last for begin, last in spans) else -100
            for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
    if not chats and tokenizer.eos_token_id is not None:  # a chat template says itself where a turn ends
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
            labels.append(-100)
        labels[-1] = tokenizer.eos_token_id
    return {"input_ids": ids, "labels": labels}


def _rendered(row: Record, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, list[tuple[int, int]]]:
    """A chat as its template writes it, and where in it the model speaks: every assistant turn, or the completion."""

    def render(messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # templates are programs; many refuse roles or orders with an error of their own
            raise DataError(f"{where} is refused by the model's chat template: {reason(error)}", fix="correct or remove the record") from error

    messages = row.get("messages") or [*row["prompt"], *row["completion"]]
    text = render(messages)
    if "messages" not in row:
        # Where the prompt alone is rendered otherwise than followed by an answer, the completion begins where the two part, as in TRL.
        return text, [(_common(text, render(row["prompt"], add_generation_prompt=True)), len(text))]
    spans = []
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(messages[:at], add_generation_prompt=True) if at else "", render(messages[: at + 1])
            begin, end = _common(text, before), _common(text, after)
            if end <= begin:
                raise DataError(
                    f"{where}: the chat template writes turn {at + 1} otherwise when others follow, so its tokens cannot be told apart",
                    fix="use 'loss: all', or one turn a record as prompt_completion",
                )
            spans.append((begin, end))
    return text, spans


def _common(text: str, other: str) -> int:
    """Length of the prefix that two texts share."""
    return len(commonprefix([text, other]))  # noqa: RUF071 - of texts, not of paths
