"""Turn records into rows of tokens and labels, which TRL truncates, packs and collates."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Json,
    Value,
    concatenate_datasets,
    interleave_datasets,
)
from transformers import PreTrainedTokenizerBase

from arctic_plugins.errors import DataError
from arctic_plugins_huggingface.training.chats import Record, converted, prompted, rendered, unknown_fields
from arctic_plugins_huggingface.training.counts import DataCounts, Limits, UnknownTokens
from arctic_plugins_huggingface.training.recipe import DataConfig, DataSource
from arctic_plugins_huggingface.training.records import read_records
from arctic_plugins_huggingface.training.trainers import TRAINERS, TRLTrainer

__all__ = ["TrainingData", "load_data", "tokenized"]

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
_BATCH = 1000
Row = dict[str, Any]
AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


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
            total.skip_also(self.eval_counts)
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
        unknown = UnknownTokens(self.limits, self.tokenizer)
        for where, record in read_records(source, streaming=self.config.streaming):
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
                        self.limits.check(ids, min(len(ids), self.config.max_length), where)
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
                    unknown.add(ids[self._window], where)
                if self.config.streaming:  # these rows are trained on before the others are read
                    unknown.check()
                yield row.columns
        unknown.check()

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
        most = self.config.max_length
        trains = len(start) < most if self.trainer.truncates else max(map(len, texts.values())) <= most
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
