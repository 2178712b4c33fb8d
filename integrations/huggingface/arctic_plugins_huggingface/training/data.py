"""Turn data files into rows of tokens and labels, which TRL truncates, packs and collates.

Files are read here so that an error can name the bad line: pyarrow's JSON reader, which ``datasets.load_dataset`` uses,
names blocks instead, and infers types (a column of dates becomes timestamps).
"""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DownloadConfig,
    Features,
    IterableDataset,
    Json,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from transformers import PreTrainedTokenizerBase

from arctic_plugins.errors import DataError, one_line, suggest
from arctic_plugins_huggingface.files.check import hub_trouble
from arctic_plugins_huggingface.training.chats import Record, converted, prompted, rendered, unknown_fields
from arctic_plugins_huggingface.training.recipe import DataConfig, DataSource
from arctic_plugins_huggingface.training.trainers import TRAINERS, TRLTrainer

__all__ = ["DataCounts", "Limits", "TrainingData", "load_data", "tokenized"]

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
_BATCH = 1000
_EXAMPLES = 3
Row = dict[str, Any]
AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


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
    skipped: int = 0
    """Records that cannot be used."""
    reasons: list[str] = field(default_factory=list)
    """Why the first of these were skipped, with file and line."""
    shares: dict[str, int] = field(default_factory=dict)
    """The name of each of several sources, and the number of its rows in an epoch; empty for streams."""

    def __str__(self) -> str:
        parts = [f"{self.rows:,} rows, {self.tokens:,} tokens"]
        if self.truncated + self.dropped:
            parts.append(f"{self.truncated} of them truncated, {self.cut_tokens:,} tokens cut, {self.dropped} dropped")
        if self.divided:
            parts.append(
                f"{self.divided:,} chats split into one row per answer (the template renders an answer differently "
                "once others follow)"
            )
        if self.shares:
            parts.append("an epoch has " + ", ".join(f"{rows:,} of {name}" for name, rows in self.shares.items()))
        if self.skipped:
            more = ", ..." if self.skipped > len(self.reasons) else ""
            parts.append(f"{self.skipped:,} records skipped: {', '.join(self.reasons)}{more}")
        return "; ".join(parts)

    @classmethod
    def total(cls, parts: Sequence[DataCounts], shares: Sequence[tuple[str, int]] = ()) -> DataCounts:
        """Return the sum of the counts of several sources."""
        numbers = ("rows", "tokens", "truncated", "dropped", "cut_tokens", "divided", "skipped")
        return cls(
            **{name: sum(getattr(part, name) for part in parts) for name in numbers},
            reasons=[reason for part in parts for reason in part.reasons][:_EXAMPLES],
            shares=dict(shares),
        )

    def skip(self, error: DataError) -> None:
        """Count a record that cannot be used because of ``error``."""
        self.skipped += 1
        if len(self.reasons) < _EXAMPLES:
            self.reasons.append(error.found)


@dataclass(frozen=True)
class Limits:
    """Limits of a model's input; None where its config specifies none."""

    positions: int | None = None
    """Maximum number of tokens in a row."""
    embeddings: int | None = None
    """Number of token ids: 0 to this number minus 1."""

    def check(self, length: int, kept: int, where: str) -> None:
        """Raise DataError if a row of ``length`` tokens, of which ``kept`` remain after truncation, is too long."""
        if self.positions is not None and kept > self.positions:
            raise DataError(
                f"{where} has {length} tokens, but the model has {self.positions} positions",
                expected=f"data.max_length of at most {self.positions}",
                fix="lower it, or extend the context with the plugin 'rope'",
            )


@dataclass(frozen=True)
class TrainingData:
    """Rows before truncation.

    They have ``input_ids`` and ``labels`` (-100 where there is no loss). Those of preferences have the columns that
    TRL's trainers take and tokenize: ``prompt``, ``chosen`` and ``rejected`` (for KTO, ``completion`` and ``label``),
    texts or lists of messages, and ``tools`` as JSON.
    """

    train: Dataset | IterableDataset
    eval: Dataset | None
    source_counts: tuple[DataCounts, ...]
    """Counts of the training rows of each source, including those held out for evaluation."""
    eval_counts: DataCounts | None = None
    """Counts of the evaluation rows, if they come from a separate source."""
    shares: tuple[tuple[str, int], ...] = ()
    """The name of each of several sources, and the number of its rows in an epoch; empty for streams."""

    @property
    def counts(self) -> DataCounts:
        """Counts of the training rows, including those held out for evaluation, and all records that were skipped."""
        total = DataCounts.total(self.source_counts, self.shares)
        if self.eval_counts is not None:  # what was left out there would otherwise show nowhere
            total.skipped += self.eval_counts.skipped
            total.reasons = [*total.reasons, *self.eval_counts.reasons][:_EXAMPLES]
        return total


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    keep_end: bool = False,
    limits: Limits | None = None,
    trainer: TRLTrainer = TRAINERS["sft"],
) -> TrainingData:
    """Read, check and tokenize the training data and, if any, the evaluation data.

    Args:
        config: what to read.
        tokenizer: must have a chat template, unless the data are plain texts.
        seed: for choosing the rows that are held out, for the order of a stream, and for mixing weighted sources.
        keep_end: count what ``training.truncation_mode: keep_end`` removes.
        limits: limits of the model; None skips the check.
        trainer: the trainer that the rows are for.

    Raises:
        DataError: if the data are missing, empty or malformed (the message names the line), a record lacks a column or
            has a value of the wrong type (the message names it), a row exceeds ``limits``, truncation leaves no row
            with labels, or the tokenizer lacks what the format needs.
    """
    reader, sources = _Reader(config, tokenizer, keep_end, limits or Limits(), trainer), config.train_sources
    for source in (*sources, config.eval_source):
        if source is not None:
            reader.check_tokenizer(source)
    evaluation, eval_counts = None, None
    if config.eval_source is not None:
        eval_counts = DataCounts()
        evaluation = reader.table(config.eval_source, eval_counts)
    counts = tuple(DataCounts() for _ in sources)
    if config.streaming:
        stream, held_out = reader.stream(sources, counts, seed)
        return TrainingData(stream, evaluation if held_out is None else held_out, counts, eval_counts)
    tables = [reader.table(source, own) for source, own in zip(sources, counts, strict=True)]
    train, held_out, shares = _arranged(tables, config, seed)
    if held_out is not None and any(own.divided for own in counts):
        logger.warning(
            "data.eval_size may hold out some rows of a chat while its others are trained on; data.eval_path keeps "
            "chats apart"
        )
    names = [Path(source.path).name for source in sources]
    if len(set(names)) < len(names):
        names = [source.path for source in sources]
    return TrainingData(
        train,
        evaluation if held_out is None else held_out,
        counts,
        eval_counts,
        tuple(zip(names, shares, strict=True)) if len(sources) > 1 else (),
    )


def _arranged(tables: list[Dataset], config: DataConfig, seed: int) -> tuple[Dataset, Dataset | None, list[int]]:
    """Return the training rows of an epoch, the rows held out, and how many training rows each source has.

    Rows are held out before those of weighted sources are repeated, so that no row is in both.
    """
    if any(table.features != tables[0].features for table in tables):
        raise DataError(
            "some of data.sources have texts and others have lists of messages",
            expected="one of the two in all preferences",
            fix="convert the others",
        )
    everything, weighted = concatenate_datasets(tables), config.train_sources[0].weight is not None
    if config.eval_size is None and not weighted:
        return everything, None, [len(table) for table in tables]
    rows = Dataset.from_dict(
        {"row": range(len(everything)), "source": [at for at, table in enumerate(tables) for _ in range(len(table))]}
    )
    held_out = None
    if config.eval_size is not None:
        if len(rows) < 2 or (isinstance(config.eval_size, int) and config.eval_size >= len(rows)):
            raise DataError(
                f"data.eval_size {config.eval_size} leaves none of the {len(rows)} rows to train on", fix="lower it"
            )
        parts = rows.train_test_split(test_size=config.eval_size, seed=seed)
        rows, held_out = parts["train"], everything.select(parts["test"]["row"])
    if weighted:
        own: list[list[int]] = [[] for _ in tables]
        for row, at in zip(rows["row"], rows["source"], strict=True):
            own[at].append(row)
        if [] in own:
            raise DataError(
                f"data.eval_size {config.eval_size} leaves no row of {config.train_sources[own.index([])].path} to "
                "train on",
                fix="lower it, or use data.eval_path",
            )
        numbered = [Dataset.from_dict({"row": part, "source": [at] * len(part)}) for at, part in enumerate(own)]
        rows = _mixed(numbered, config, seed)
    sources = Counter(rows["source"])
    return everything.select(rows["row"]), held_out, [sources[at] for at in range(len(tables))]


def _mixed(parts: list[AnyDataset], config: DataConfig, seed: int) -> AnyDataset:
    """Return the rows of several sources: one source after the other, or drawn by their weights."""
    weights = [source.weight for source in config.train_sources if source.weight is not None]
    if not weights or len(parts) == 1:
        return concatenate_datasets(parts)
    return interleave_datasets(
        parts,
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        stopping_strategy=config.stopping_strategy,
    )


@dataclass(frozen=True)
class _Reader:
    """Reads records and turns them into rows."""

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    keep_end: bool
    limits: Limits
    trainer: TRLTrainer

    def check_tokenizer(self, source: DataSource) -> None:
        """Raise DataError if the tokenizer lacks what the format of ``source`` needs."""
        if source.format in ("alpaca", "messages") and self.tokenizer.chat_template is None:
            raise _without_template(f"data.format is '{source.format}'")
        if source.loss == "completion" and source.format not in ("text", "preference") and not self.tokenizer.is_fast:
            raise DataError(
                f"the model's tokenizer ({type(self.tokenizer).__name__}) does not report which characters a token "
                "stands for",
                expected="a fast tokenizer, which does, for data.loss 'completion'",
                fix="set data.loss to 'all'",
            )

    def table(self, source: DataSource, counts: DataCounts, most: int | None = None) -> Dataset:
        """Return the rows of ``source``, or the first ``most``."""
        rows = islice(self.rows(source, counts), most)
        if source.format == "preference":
            return self._preferences(list(rows), source, counts)
        batches = []
        while batch := list(islice(rows, _BATCH)):
            batches.append(pa.RecordBatch.from_pylist(batch, schema=_SCHEMA))
        if not batches:
            raise self._nothing_left(source, counts)
        return Dataset(pa.Table.from_batches(batches, schema=_SCHEMA))

    def _preferences(self, rows: list[Row], source: DataSource, counts: DataCounts) -> Dataset:
        if not rows:
            raise self._nothing_left(source, counts)
        chats = isinstance(rows[0]["prompt"], list)
        if (other := next((row for row in rows if isinstance(row["prompt"], list) != chats), None)) is not None:
            raise DataError(
                f"{source.path} has both texts and lists of messages, for example {str(other['prompt'])[:80]!r}",
                expected="one of the two",
                fix="convert the others",
            )
        # As JSON, because Arrow's structs would give every call the arguments of all others, as nulls.
        kinds = {"tools": Value("string"), "label": Value("bool")}
        features: Any = {key: kinds.get(key, Json() if chats else Value("string")) for key in rows[0]}
        return Dataset.from_list(rows, features=Features(features))

    def _nothing_left(self, source: DataSource, counts: DataCounts) -> DataError:
        if not counts.rows:
            return DataError(
                f"none of the {counts.skipped:,} records of {source.path} can be used, for example {counts.reasons[0]}",
                expected=f"records of the format '{source.format}'",
                fix="correct data.format, data.columns or the data",
            )
        return DataError(
            f"no row of {source.path} has anything left to train on within data.max_length {self.config.max_length}",
            expected="rows whose completion begins earlier",
            fix=f"raise data.max_length (average row: {counts.tokens // counts.rows} tokens)",
        )

    def stream(
        self, sources: Sequence[DataSource], counts: Sequence[DataCounts], seed: int
    ) -> tuple[IterableDataset, Dataset | None]:
        """Return the rows of ``sources``, read while training, and the first ones if they are held out."""
        size = self.config.eval_size if isinstance(self.config.eval_size, int) else 0
        streams = []
        for source, own in zip(sources, counts, strict=True):
            first = DataCounts()  # an error in the first row is reported before weights are read
            if next(self.rows(source, first), None) is None:
                raise self._nothing_left(source, first)

            def read(source: DataSource = source, own: DataCounts = own) -> Iterator[Row]:
                vars(own).update(vars(DataCounts()))  # each pass starts counting from zero
                return islice(self.rows(source, own), size, None)

            streams.append(IterableDataset.from_generator(read))
        held_out = self.table(sources[0], DataCounts(), size) if size else None
        mixed = streams[0] if len(streams) == 1 else _mixed(streams, self.config, seed)
        return mixed.shuffle(seed=seed, buffer_size=self.config.shuffle_buffer), held_out

    def rows(self, source: DataSource, counts: DataCounts) -> Iterator[Row]:
        """Yield rows, count what truncation will remove, and drop rows with nothing left to train on."""
        told: set[str] = set()
        unknown: dict[int, str] = {}
        for where, record in _records(source, streaming=self.config.streaming):
            try:
                if isinstance(record, DataError):
                    raise record
                if new := sorted({*unknown_fields(record, source)} - told):
                    told.update(new)
                    fields = ", ".join(new)
                    logger.warning("%s has fields that the format '%s' does not use: %s", where, source.format, fields)
                rows = list(self._converted(converted(record, where, source), where, source))
                for row in rows:
                    for ids in row.texts:
                        self.limits.check(len(ids), min(len(ids), self.config.max_length), where)
            except DataError as error:
                if self.config.on_bad_record == "error":
                    raise
                counts.skip(error)
                continue
            counts.divided += len(rows) > 1 and source.format != "preference"
            for row in rows or [_Row({}, [], trains=False)]:  # a chat with nothing to train on has no rows
                counts.rows += 1
                counts.tokens += sum(map(len, row.texts))
                over = [0 if self.config.splits else max(0, len(ids) - self.config.max_length) for ids in row.texts]
                counts.truncated += any(over)
                counts.cut_tokens += sum(over)
                if not row.trains:
                    counts.dropped += 1
                    continue
                for ids in row.texts:
                    self._check_embedded(ids[self._window], where, unknown)
                if unknown and self.config.streaming:
                    raise self._not_embedded(unknown)
                yield row.columns
        if unknown:
            raise self._not_embedded(unknown)

    @property
    def _window(self) -> slice:
        """The part of a row that truncation leaves."""
        if self.config.splits:
            return slice(None)
        return slice(-self.config.max_length, None) if self.keep_end else slice(None, self.config.max_length)

    def _converted(self, row: Record, where: str, source: DataSource) -> Iterator[_Row]:
        if source.format == "preference":
            yield from self._preference(row, where)
            return
        for columns in tokenized(row, self.tokenizer, where, source):
            trains = any(label != -100 for label in columns["labels"][self._window])
            yield _Row(columns, [columns["input_ids"]], trains=trains)

    def _preference(self, row: Record, where: str) -> Iterator[_Row]:
        """Yield what TRL takes; it is tokenized here only to check and count it."""
        prompt, tools = row["prompt"], row["tools"]
        if "label" in row and self.trainer.paired:
            raise DataError(
                f"{where} has one answer and a label, but training.trainer is '{self.trainer.name}'",
                expected="'chosen' and 'rejected'",
                fix="set training.trainer to kto",
            )
        if tools and not self.trainer.tools:
            raise DataError(
                f"{where} has tools, which TRL's trainer '{self.trainer.name}' does not show to the chat template",
                fix="use another training.trainer, or remove them",
            )
        answers: Row = {key: row[key] for key in ("chosen", "rejected", "completion") if key in row}
        if isinstance(prompt, str):
            end = self.tokenizer.eos_token or ""
            start = self._ids(prompt, where, special=True)
            texts = {key: self._ids(prompt + text + end, where, special=True) for key, text in answers.items()}
        else:
            if self.tokenizer.chat_template is None:
                raise _without_template(f"{where} has messages")
            start = self._ids(prompted(prompt, tools, self.tokenizer, where), where)
            texts = {}
            for key, answer in answers.items():
                chat = {"messages": [*prompt, *answer], "learnt": [False] * len([*prompt, *answer]), "tools": tools}
                [(text, _)] = rendered(chat, self.tokenizer, where, everything=True)
                texts[key] = self._ids(text, where)
        trains = len(start) < self.config.max_length
        shared = {"prompt": prompt, "tools": json.dumps(tools) if tools else None}
        if self.trainer.paired:
            yield _Row({**shared, **answers}, list(texts.values()), trains=trains)
            return
        for key, answer in answers.items():
            good = row["label"] if key == "completion" else key == "chosen"
            yield _Row({**shared, "completion": answer, "label": good}, [texts[key]], trains=trains)

    def _ids(self, text: str, where: str, *, special: bool = False) -> list[int]:
        check_text(text, where)
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _check_embedded(self, ids: Sequence[int], where: str, unknown: dict[int, str]) -> None:
        """Add the tokens among ``ids`` that the model has no embedding for: token -> where it first occurred."""
        if self.limits.embeddings is not None and ids and max(ids) >= self.limits.embeddings:
            for token in ids:
                if token >= self.limits.embeddings:
                    unknown.setdefault(token, where)

    def _not_embedded(self, unknown: Mapping[int, str]) -> DataError:
        names = [f"{self.tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in sorted(unknown)]
        more = f" and {len(names) - _EXAMPLES} others" if len(names) > _EXAMPLES else ""
        return DataError(
            f"the model has no embedding for {len(names)} of the tokens in the data: {', '.join(names[:_EXAMPLES])}"
            f"{more}, first at {next(iter(unknown.values()))}",
            expected=f"tokens below {self.limits.embeddings}",
            fix="list them under data.new_tokens, which adds embeddings for them and trains these, or use the model's "
            "own tokenizer",
        )


@dataclass(frozen=True)
class _Row:
    columns: Row
    texts: list[list[int]]
    """The tokens of each text that the model will read, before truncation."""
    trains: bool
    """Whether truncation leaves something to train on."""


def _without_template(found: str) -> DataError:
    return DataError(
        f"{found}, but the model's tokenizer has no chat template",
        expected="a chat model, or a template for a base model",
        fix="set data.chat_template (chatml, alpaca, the name of a model family, or a file), or use texts: the format "
        "prompt_completion",
    )


def check_text(text: str, where: str) -> None:
    """Raise DataError if ``text`` contains half of a surrogate pair, which no encoding and no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} contains the lone surrogate {text[error.start]!r}, which is not a character",
            expected="text that can be encoded as UTF-8",
            fix="correct or remove the record, or set data.on_bad_record to skip",
        ) from error


def _records(source: DataSource, *, streaming: bool = False) -> Iterator[tuple[str, Record | DataError]]:
    """Yield (where, record); ``where`` locates the record in error messages: file and line, or file and record.

    In place of a record that cannot be read, yield the error.
    """
    path = Path(source.path)
    records = _file_records(path) if path.is_file() else _hub_records(source, streaming=streaming)
    empty = True
    for where, record in records:
        empty = False
        yield where, _mapped(record, where, source)
    if empty:
        raise DataError(f"data.path {source.path} is empty", expected="at least one record", fix="correct data.path")


def _mapped(record: Any, where: str, source: DataSource) -> Record | DataError:
    """Return ``record`` with the format's keys."""
    if isinstance(record, DataError):
        return record
    if not isinstance(record, dict):
        return DataError(f"{where} is {type(record).__name__}", expected="an object", fix="correct or remove it")
    for key, column in source.columns.items():
        if column not in record:
            return DataError(
                f"{where} has no column '{column}' (data.columns.{key})", fix=suggest(column, map(str, record))
            )
        record = {**record, key: record[column]}
    return record


def _file_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        if path.suffix in (".csv", ".tsv"):
            yield from _csv_records(path)
        elif path.suffix == ".parquet":
            number = 0
            for batch in pq.ParquetFile(path).iter_batches(_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: record {number}", _without_nulls(record)
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
                    record = DataError(f"{path}:{number} is not valid JSON: {error}", fix="correct or remove the line")
                yield f"{path}:{number}", record


def _csv_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for record in reader:
                where = f"{path}:{reader.line_num}"
                if None in record or None in record.values():
                    wanted = len(reader.fieldnames or ())
                    yield (
                        where,
                        DataError(
                            f"{where} does not have as many fields as the header, {wanted}", fix="correct the line"
                        ),
                    )
                    continue
                yield where, record
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.reader.line_num} is not valid CSV: {error}", fix="correct the line"
            ) from error


def _hub_records(source: DataSource, *, streaming: bool) -> Iterator[tuple[str, Any]]:
    trouble = hub_trouble()
    how = None if trouble is None else DownloadConfig(local_files_only=True)
    try:
        dataset = load_dataset(  # type: ignore[call-overload]  # no overload for a non-literal `streaming`
            source.path, source.name, split=source.split, streaming=streaming, download_config=how
        )
    except Exception as error:  # datasets raises its own errors and those of the Hub, httpx and the builder
        raise DataError(
            f"data.path {source.path} is not a local file and cannot be loaded as a dataset: "
            f"{trouble or one_line(error)}",
            expected="a file, or the id of an accessible dataset",
            fix="correct data.path, data.name or data.split",
        ) from error
    yield from (
        (f"{source.path}: row {number}", _without_nulls(dict(record))) for number, record in enumerate(dataset, 1)
    )


def _without_nulls(record: Record) -> Record:
    """Remove nulls inside the values of ``record``.

    In Arrow's columns, every call has the arguments, and every tool the parameters, that any other has.
    """

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(inner) for key, inner in value.items() if inner is not None}
        return [cleaned(inner) for inner in value] if isinstance(value, list) else value

    return {key: cleaned(value) for key, value in record.items()}


def tokenized(
    row: Record, tokenizer: PreTrainedTokenizerBase, where: str, source: DataSource
) -> Iterator[dict[str, list[int]]]:
    """Yield the tokens and labels of the row, or of each row that its template turns it into.

    A token has a label if its characters overlap what the model is trained to produce.
    """
    everything, chats = source.loss == "all" or "text" in row, "messages" in row
    if chats:
        texts = rendered(row, tokenizer, where, everything=everything)
    elif "text" in row:
        texts = [(row["text"], [])]
    else:
        text = row["prompt"] + row["completion"]
        texts = [(text, [(len(row["prompt"]), len(text))])]
    for text, spans in texts:
        check_text(text, where)
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
