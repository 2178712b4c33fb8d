"""Labeled data: texts with a class, several classes or a number, and words with a class each. And their Trainer.

Read in transformers 5.19.0 (``data/data_collator.py``, ``loss/loss_utils.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    BatchEncoding,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from arctic_plugins.errors import DataError, one_line, suggest
from arctic_plugins_huggingface.training.counts import DataCounts, Limits, UnknownTokens
from arctic_plugins_huggingface.training.data import TrainingData
from arctic_plugins_huggingface.training.recipe import DataConfig, DataSource
from arctic_plugins_huggingface.training.records import read_records

__all__ = ["Labels", "label_trainer_arguments", "load_labeled", "read_labels"]


@dataclass(frozen=True)
class Labels:
    """The classes of labeled data."""

    names: tuple[str, ...]
    """Name of each class, in the order of their numbers; the single output for numbers to predict."""
    problem_type: str | None = None
    """transformers' ``problem_type``; None for the classes of words."""

    def config(self) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained`` that give a model these labels."""
        return {"id2label": dict(enumerate(self.names))} | (
            {"problem_type": self.problem_type} if self.problem_type else {}
        )

    @property
    def of_words(self) -> bool:
        """Whether every word has a class, instead of every text."""
        return self.problem_type is None

    def of(self, record: Any, where: str) -> float | list[int] | list[float]:
        """Return the label of a record, as transformers' losses take it; of words, a class for each.

        Raises:
            DataError: a field is missing, the class is unknown, or the label is not of the kind of the others.
        """
        value = _label(record, where, words=self.of_words)
        if self.problem_type == "regression":
            if (number := _number(value)) is None:
                raise DataError(f"{where} has label {value!r}", expected="a number", fix="correct the record")
            return number
        several = [self._index(name, where) for name in (value if isinstance(value, list) else [value])]
        if self.of_words:
            return several
        if self.problem_type == "multi_label_classification":
            return [float(number in several) for number in range(len(self.names))]
        if isinstance(value, list):
            raise DataError(
                f"{where} has several labels", expected="one class, as in other records", fix="correct the record"
            )
        return several[0]

    def _index(self, name: Any, where: str) -> int:
        if str(name) in self.names:
            return self.names.index(str(name))
        if type(name) is int and 0 <= name < len(self.names):
            return name
        raise DataError(f"{where} has label {name!r}", expected="a known class", fix=suggest(str(name), self.names))


def read_labels(config: DataConfig, known: Sequence[str] | None = None, problem_type: str | None = None) -> Labels:
    """Return the labels of ``config``: those that it sets, those of a trained model, or all in the training data.

    Classes that are numbers are ordered by value, others by name. Labels that are numbers with a fraction are to be
    predicted; lists of classes are several classes of one text.

    Args:
        config: the data.
        known: classes of the model, if it is a classifier already.
        problem_type: that of the model.

    Raises:
        DataError: a record is malformed, or the data have a single class.
    """
    words, names = config.format == "token_classification", config.labels or known
    if known is not None and names is known:
        return Labels(tuple(known), None if words else problem_type or "single_label_classification")
    found, several, fraction, numbers = dict[str, None](), False, False, True
    for where, record in _records(config.train_sources[0]):
        value = _label(record, where, words=words)
        several |= isinstance(value, list)
        for each in value if isinstance(value, list) else [value]:
            found[str(each)] = None
            number = _number(each)
            numbers &= number is not None
            fraction |= number is not None and (isinstance(each, float) or not number.is_integer())
    if words:
        kind = None
    elif several:
        kind = "multi_label_classification"
    else:
        kind = "regression" if fraction and numbers and names is None else "single_label_classification"
    if kind == "regression":
        return Labels(("value",), kind)
    if names is None:
        names = sorted(found, key=lambda name: (float(name), name)) if numbers else sorted(found)
    if len(names) < 2:
        raise DataError(
            f"{config.path} has the single class {next(iter(names), None)!r}",
            expected="at least two",
            fix="correct the data, or list all classes in data.labels",
        )
    return Labels(tuple(names), kind)


def _records(source: DataSource) -> Iterator[tuple[str, Any]]:
    for where, record in read_records(source):
        if isinstance(record, DataError):
            raise record
        yield where, record


def _label(record: Any, where: str, *, words: bool) -> Any:
    """Return the label of a record, after checking its fields."""
    field, key, expected = ("tokens", "tags", "a list of words") if words else ("text", "label", "a text")
    value, label = record.get(field), record.get(key)
    right = (
        isinstance(value, list) and value and all(isinstance(word, str) for word in value)
        if words
        else isinstance(value, str)
    )
    if not right:
        found = f"{field} {type(value).__name__}" if field in record else f"no '{field}'"
        raise DataError(f"{where} has {found}", expected=expected, fix=f"correct it, or set data.columns.{field}")
    if label is None or isinstance(label, dict) or (words and not isinstance(label, list)):
        found = f"{key} {type(label).__name__}" if key in record else f"no '{key}'"
        raise DataError(f"{where} has {found}", expected="a class", fix=f"correct it, or set data.columns.{key}")
    if words and len(label) != len(value):
        raise DataError(
            f"{where} has {len(value)} tokens and {len(label)} tags", expected="as many", fix="correct the record"
        )
    return label


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and not isinstance(value, bool) else None


def load_labeled(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels,
    *,
    seed: int = 0,
    limits: Limits | None = None,
) -> TrainingData:
    """Read, check and tokenize labeled training data and, if any, evaluation data.

    Of a word that becomes several tokens, the first has its class, the others have none.

    Raises:
        DataError: if the data are missing, empty or malformed (the message names the line), or a class is unknown.
    """
    if config.format == "token_classification" and not tokenizer.is_fast:
        raise DataError(
            f"the model's tokenizer ({type(tokenizer).__name__}) does not report which word a token belongs to",
            expected="a fast tokenizer, which does",
        )
    counts, evaluation, eval_counts = DataCounts(), None, None

    def table(source: DataSource, counts: DataCounts) -> Dataset:
        rows = _rows(source, config.max_length, tokenizer, labels, counts, limits or Limits())
        return Dataset.from_list(list(rows))

    if config.eval_source is not None:
        evaluation = table(config.eval_source, eval_counts := DataCounts())
    train = table(config.train_sources[0], counts)
    if config.eval_size is not None:
        if len(train) < 2 or (isinstance(config.eval_size, int) and config.eval_size >= len(train)):
            raise DataError(
                f"data.eval_size {config.eval_size} leaves none of the {len(train)} rows to train on", fix="lower it"
            )
        parts = train.train_test_split(test_size=config.eval_size, seed=seed)
        train, evaluation = parts["train"], parts["test"]
    return TrainingData(train, evaluation, (counts,), eval_counts)


def _rows(
    source: DataSource,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels,
    counts: DataCounts,
    limits: Limits,
) -> Iterator[dict[str, Any]]:
    unknown = UnknownTokens(limits, tokenizer)

    def encode(texts: list[Any], **options: Any) -> BatchEncoding:
        try:
            return tokenizer(*texts, is_split_into_words=labels.of_words, verbose=False, **options)
        except Exception as error:  # tokenizers raises bare Exceptions, and a TypeError for an unpaired surrogate
            raise DataError(f"{where} cannot be tokenized: {one_line(error)}", fix="correct the record") from error

    for where, record in _records(source):
        label: Any = labels.of(record, where)
        texts = [record["tokens"]] if labels.of_words else [record["text"]]
        if isinstance(pair := record.get("text_pair"), str) and not labels.of_words:
            texts.append(pair)
        encoded = encode(texts)
        length = len(encoded["input_ids"])
        counts.rows += 1
        counts.tokens += length
        if length > max_length:
            counts.truncated += 1
            counts.cut_tokens += length - max_length
            encoded = encode(texts, truncation=True, max_length=max_length)
        if labels.of_words:
            words = encoded.word_ids()
            label = [
                label[word] if word is not None and (at == 0 or words[at - 1] != word) else -100
                for at, word in enumerate(words)
            ]
        limits.check(encoded["input_ids"], len(encoded["input_ids"]), where)
        unknown.add(encoded["input_ids"], where)
        yield {**encoded, "labels": label}
    unknown.check()


def label_trainer_arguments(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labels: Labels
) -> dict[str, Any]:
    """Return the arguments that a ``Trainer`` of ``model`` needs for labeled data: its collator and its metrics.

    Also sets the padding token of ``model``, by which it finds the last token of a text.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    text_config = model.config.get_text_config()
    if getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    collator = (DataCollatorForTokenClassification if labels.of_words else DataCollatorWithPadding)(tokenizer)
    metrics = None if labels.problem_type == "regression" else _metrics(labels)
    return {"data_collator": collator, "compute_metrics": metrics}


def _metrics(labels: Labels) -> Callable[[EvalPrediction], dict[str, float]]:
    def compute(outputs: EvalPrediction) -> dict[str, float]:
        logits = outputs.predictions[0] if isinstance(outputs.predictions, tuple) else outputs.predictions
        wanted = np.asarray(outputs.label_ids)
        if labels.problem_type == "multi_label_classification":
            chosen, right = np.asarray(logits) > 0, wanted > 0.5
            return {"f1": float(2 * (chosen & right).sum() / max(1, chosen.sum() + right.sum()))}
        counted = wanted != -100
        return {"accuracy": float((np.asarray(logits).argmax(-1) == wanted)[counted].mean())}

    return compute
