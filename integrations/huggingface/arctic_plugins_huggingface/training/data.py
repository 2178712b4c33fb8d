"""Turn data files into rows of tokens and labels, which TRL truncates, packs and collates.

Files are read here so that an error can name the bad line: pyarrow's JSON reader, which ``datasets.load_dataset`` uses,
names blocks instead, and infers types (a column of dates becomes timestamps).
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DownloadConfig, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase

from arctic_plugins.errors import DataError, one_line, suggest
from arctic_plugins_huggingface.files.check import hub_trouble
from arctic_plugins_huggingface.training.chats import Record, converted, rendered, unknown_fields
from arctic_plugins_huggingface.training.recipe import DataConfig

__all__ = ["DataCounts", "Limits", "TrainingData", "load_data", "tokenized"]

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
_BATCH = 1000


@dataclass
class DataCounts:
    """Counts of the rows and of what happened to them; those of a stream grow while it is read."""

    rows: int = 0
    tokens: int = 0
    """Tokens before truncation."""
    truncated: int = 0
    """Rows longer than ``max_length``."""
    dropped: int = 0
    """Rows with nothing to train on within ``max_length``."""
    cut_tokens: int = 0
    divided: int = 0
    """Chats split into one row per answer, because their template renders an answer differently once others follow."""

    def __str__(self) -> str:
        cut = (
            f"; {self.truncated} of them truncated, {self.cut_tokens:,} tokens cut, {self.dropped} dropped"
            if self.truncated + self.dropped
            else ""
        )
        divided = (
            f"; {self.divided:,} chats split into one row per answer (the template renders an answer differently once "
            "others follow)"
            if self.divided
            else ""
        )
        return f"{self.rows:,} rows, {self.tokens:,} tokens{cut}{divided}"


@dataclass(frozen=True)
class Limits:
    """Limits of a model's input; None where its config specifies none."""

    positions: int | None = None
    """Maximum number of tokens in a row."""
    embeddings: int | None = None
    """Number of token ids: 0 to this number minus 1."""

    def check(self, ids: Sequence[int], kept: int, where: str) -> None:
        """Raise DataError if the row of ``ids``, of which ``kept`` remain after truncation, exceeds a limit."""
        if self.positions is not None and kept > self.positions:
            raise DataError(
                f"{where} has {len(ids)} tokens, but the model has {self.positions} positions",
                expected=f"data.max_length of at most {self.positions}",
                fix="lower it, or extend the context with the plugin 'rope'",
            )
        if self.embeddings is not None and ids and max(ids) >= self.embeddings:
            raise DataError(
                f"{where} has the token {max(ids)}, but the model has embeddings for {self.embeddings}",
                expected="the model's own tokenizer",
                fix="resize the model's embeddings (resize_token_embeddings in transformers) and save it, or remove "
                "the added tokens",
            )


@dataclass(frozen=True)
class TrainingData:
    """Rows with ``input_ids`` and ``labels`` (-100 where there is no loss), before truncation."""

    train: Dataset | IterableDataset
    eval: Dataset | None
    counts: DataCounts
    """Counts of the training rows, including those held out for evaluation."""
    eval_counts: DataCounts | None = None
    """Counts of the evaluation rows, if they come from a separate source."""


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    keep_end: bool = False,
    limits: Limits | None = None,
) -> TrainingData:
    """Read, check and tokenize the training data and, if any, the evaluation data.

    Args:
        config: what to read.
        tokenizer: must have a chat template, unless the data are plain texts.
        seed: for choosing the rows that are held out, and for the order of a stream.
        keep_end: count what ``training.truncation_mode: keep_end`` removes.
        limits: limits of the model; None skips the check.

    Raises:
        DataError: if the data are missing, empty or malformed (the message names the line), a record lacks a column or
            has a value of the wrong type (the message names it), a row exceeds ``limits``, truncation leaves no row
            with labels, or the tokenizer lacks what the format needs.
    """
    if config.format in ("alpaca", "messages") and tokenizer.chat_template is None:
        raise DataError(
            f"data.format is '{config.format}', but the model's tokenizer has no chat template",
            expected="a chat model",
            fix="set tokenizer.chat_template and save the tokenizer, or use the format prompt_completion",
        )
    if config.loss == "completion" and config.format != "text" and not tokenizer.is_fast:
        raise DataError(
            f"the model's tokenizer ({type(tokenizer).__name__}) does not report which characters a token stands for",
            expected="a fast tokenizer, which does, for data.loss 'completion'",
            fix="set data.loss to 'all'",
        )
    counts, evaluation, eval_counts = DataCounts(), None, None
    if config.eval_path is not None or config.eval_split is not None:
        eval_counts = DataCounts()
        other = {
            "path": config.eval_path or config.path,
            "split": config.eval_split or config.split,
            "streaming": False,
        }
        evaluation = _table(
            _rows(config.model_copy(update=other), tokenizer, eval_counts, keep_end, limits), config, eval_counts
        )
    if config.streaming:
        check_first = next(
            _rows(config, tokenizer, DataCounts(), keep_end, limits)
        )  # an error in the first row is reported before weights are read
        assert check_first.keys() == {"input_ids", "labels"}
        held_out = config.eval_size if isinstance(config.eval_size, int) else 0
        if held_out:
            evaluation = _table(
                islice(_rows(config, tokenizer, DataCounts(), keep_end, limits), held_out),
                config,
                DataCounts(rows=held_out),
            )

        def read() -> Iterator[dict[str, list[int]]]:
            vars(counts).update(vars(DataCounts()))  # each pass starts counting from zero
            return islice(_rows(config, tokenizer, counts, keep_end, limits), held_out, None)

        stream = IterableDataset.from_generator(read)
        return TrainingData(
            stream.shuffle(seed=seed, buffer_size=config.shuffle_buffer), evaluation, counts, eval_counts
        )
    train = _table(_rows(config, tokenizer, counts, keep_end, limits), config, counts)
    if config.eval_size is not None:
        if len(train) < 2 or (isinstance(config.eval_size, int) and config.eval_size >= len(train)):
            raise DataError(
                f"data.eval_size {config.eval_size} leaves none of the {len(train)} rows to train on", fix="lower it"
            )
        if counts.divided:
            logger.warning(
                "data.eval_size may hold out some rows of a chat while its others are trained on; data.eval_path keeps "
                "chats apart"
            )
        parts = train.train_test_split(test_size=config.eval_size, seed=seed)
        train, evaluation = parts["train"], parts["test"]
    return TrainingData(train, evaluation, counts, eval_counts)


def _table(rows: Iterator[dict[str, list[int]]], config: DataConfig, counts: DataCounts) -> Dataset:
    batches = []
    while batch := list(islice(rows, _BATCH)):
        batches.append(pa.RecordBatch.from_pylist(batch, schema=_SCHEMA))
    if counts.dropped == counts.rows:
        raise DataError(
            f"no row of {config.path} has anything left to train on within data.max_length {config.max_length}",
            expected="rows whose completion begins earlier",
            fix=f"raise data.max_length (average row: {counts.tokens // counts.rows} tokens)",
        )
    return Dataset(pa.Table.from_batches(batches, schema=_SCHEMA))


def _rows(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, counts: DataCounts, keep_end: bool, limits: Limits | None
) -> Iterator[dict[str, list[int]]]:
    """Tokenize records one by one, count what truncation will remove, and drop rows with nothing left to train on."""
    window = slice(-config.max_length, None) if keep_end else slice(None, config.max_length)
    splits = config.format == "text" and config.packing  # documents are split, not truncated
    told: set[str] = set()
    for where, record in _records(config):
        if new := sorted({*unknown_fields(record, config)} - told):
            told.update(new)
            logger.warning("%s has fields that the format '%s' does not use: %s", where, config.format, ", ".join(new))
        rows = list(tokenized(converted(record, where, config), tokenizer, where, config))
        counts.divided += len(rows) > 1
        for row in rows or [{"input_ids": [], "labels": []}]:  # a chat with nothing to train on has no rows
            length = len(row["input_ids"])
            counts.rows += 1
            counts.tokens += length
            if not splits and length > config.max_length:
                counts.truncated += 1
                counts.cut_tokens += length - config.max_length
            if limits is not None:
                limits.check(row["input_ids"], min(length, config.max_length), where)
            if all(label == -100 for label in row["labels"][slice(None) if splits else window]):
                counts.dropped += 1
            else:
                yield row


def _records(config: DataConfig) -> Iterator[tuple[str, Record]]:
    """Yield (where, record); ``where`` locates the record in error messages: file and line, or file and record."""
    records = _file_records(Path(config.path)) if Path(config.path).is_file() else _hub_records(config)
    empty = True
    for where, record in records:
        empty = False
        if not isinstance(record, dict):
            raise DataError(f"{where} is {type(record).__name__}", expected="an object", fix="correct or remove it")
        for key, column in config.columns.items():
            if column not in record:
                raise DataError(
                    f"{where} has no column '{column}' (data.columns.{key})", fix=suggest(column, map(str, record))
                )
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
        raise DataError(
            f"data.path {path} cannot be read: {one_line(error)}",
            expected="a complete file of the type that its extension indicates",
        ) from error


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
                    raise DataError(
                        f"{path}:{number} is not valid JSON: {error}", fix="correct or remove the line"
                    ) from error
                yield f"{path}:{number}", record


def _csv_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for record in reader:
                where = f"{path}:{reader.line_num}"
                if None in record or None in record.values():
                    raise DataError(
                        f"{where} does not have as many fields as the header, {len(reader.fieldnames or ())}",
                        fix="correct the line",
                    )
                yield where, record
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.reader.line_num} is not valid CSV: {error}", fix="correct the line"
            ) from error


def _hub_records(config: DataConfig) -> Iterator[tuple[str, Any]]:
    trouble = hub_trouble()
    how = None if trouble is None else DownloadConfig(local_files_only=True)
    try:
        dataset = load_dataset(  # type: ignore[call-overload]  # no overload for a non-literal `streaming`
            config.path, config.name, split=config.split, streaming=config.streaming, download_config=how
        )
    except Exception as error:  # datasets raises its own errors and those of the Hub, httpx and the builder
        raise DataError(
            f"data.path {config.path} is not a local file and cannot be loaded as a dataset: "
            f"{trouble or one_line(error)}",
            expected="a file, or the id of an accessible dataset",
            fix="correct data.path, data.name or data.split",
        ) from error
    yield from ((f"{config.path}: row {number}", dict(record)) for number, record in enumerate(dataset, 1))


def tokenized(
    row: Record, tokenizer: PreTrainedTokenizerBase, where: str, config: DataConfig
) -> Iterator[dict[str, list[int]]]:
    """Yield the tokens and labels of the row, or of each row that its template turns it into.

    A token has a label if its characters overlap what the model is trained to produce.
    """
    everything, chats = config.loss == "all" or "text" in row, "messages" in row
    if chats:
        texts = rendered(row, tokenizer, where, everything=everything)
    elif "text" in row:
        texts = [(row["text"], [])]
    else:
        text = row["prompt"] + row["completion"]
        texts = [(text, [(len(row["prompt"]), len(text))])]
    for text, spans in texts:
        encoded = tokenizer(text, add_special_tokens=not chats, return_offsets_mapping=not everything, verbose=False)
        ids = list(encoded["input_ids"])
        if everything:
            labels = list(ids)
        else:
            labels = [
                token if any(begin < end and start < last for begin, last in spans) else -100
                for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
            ]
        if not chats and tokenizer.eos_token_id is not None:  # a chat template marks the end of a turn itself
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(tokenizer.eos_token_id)
                labels.append(-100)
            labels[-1] = tokenizer.eos_token_id
        yield {"input_ids": ids, "labels": labels}
