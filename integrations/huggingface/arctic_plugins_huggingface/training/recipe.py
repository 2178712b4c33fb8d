"""Recipes: everything about a fine-tuning run in one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arctic_plugins.plugin import config_error
from arctic_plugins.stack import read_yaml

__all__ = ["FILE_KINDS", "DataConfig", "DataSource", "Recipe"]

FILE_KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
"""Suffixes of files; a name that ends with one is never a dataset id."""
Format = Literal[
    "alpaca", "messages", "prompt_completion", "text", "preference", "classification", "token_classification"
]
LABELED = {"classification": "text-classification", "token_classification": "token-classification"}
"""Format -> the task for which its records have labels."""
Fraction = Annotated[float, Field(gt=0, lt=1)]


class _Records(BaseModel):
    """Where records come from, and what a record means."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Format = "alpaca"
    """The fields of a record.

    ``alpaca``: ``instruction``, ``output``, and optionally ``input``, ``system`` and ``history``. ``messages``: a chat,
    as ``messages`` (``role`` and ``content``) or ``conversations`` (``from`` and ``value``), optionally with ``system``
    and ``tools``. ``prompt_completion``: ``prompt`` and ``completion``, both strings or both lists of messages.
    ``text``: ``text``. ``preference``: ``prompt``, ``chosen`` and ``rejected``, all strings or all lists of messages;
    for ``training.trainer: kto``, also ``prompt``, ``completion`` and ``label``.
    ``classification``: ``text`` (and ``text_pair``) and ``label``, a class, a list of classes, or a
    number to predict. ``token_classification``: ``tokens``, a list of words, and ``tags``, a class for each.
    """
    columns: dict[str, str] = Field(default_factory=dict)
    """The format's key -> the data's column, where they differ."""
    name: str | None = None
    """Configuration of a dataset id."""
    split: str = "train"
    """Split of a dataset id."""
    system: str | None = None
    """System message of every ``alpaca`` row; if it is not set, the chat template decides."""
    loss: Literal["completion", "all"] = "completion"
    """Tokens that the loss covers.

    ``completion``: those that the model is trained to produce (completions, and every assistant turn of a chat).
    ``all``: all tokens, as always with the format ``text``.
    """

    @model_validator(mode="after")
    def _loss_of_format(self) -> Self:
        if self.format == "text" and self.loss == "completion" and "loss" in self.model_fields_set:
            raise ValueError("loss 'all' for format 'text', which has no completions")
        if self.format == "preference" and "loss" in self.model_fields_set:
            raise ValueError("no 'loss' for format 'preference': the trainer determines it")
        return self


class DataSource(_Records):
    """A file or a dataset with records."""

    path: str
    """A JSON, JSONL, CSV, TSV or Parquet file, relative to the recipe, or an id for ``datasets.load_dataset``."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The source's share of the rows, relative to the other weights; every source has one, or none has."""


class DataConfig(_Records):
    """What to train on, and which tokens the loss covers."""

    path: str | None = None
    """A JSON, JSONL, CSV, TSV or Parquet file, relative to the recipe, or an id for ``datasets.load_dataset``."""
    sources: tuple[DataSource, ...] | None = None
    """Several files or datasets, in place of ``path``; an option that a source does not set has its value under
    ``data``.

    Without weights, every row occurs once in an epoch. With weights, ``datasets.interleave_datasets`` draws the source
    of each row with these probabilities, by ``training.seed``.
    """
    stopping_strategy: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    """When an epoch of weighted sources ends, as in ``datasets.interleave_datasets``.

    ``all_exhausted``: once every source was read to its end; those that end earlier start again. ``first_exhausted``:
    once the first source ends; no row is repeated, and the remaining rows of the others are never used.
    """
    labels: tuple[str, ...] | None = None
    """The classes of labeled data, in the order of their numbers; by default, those of the model or all in ``path``."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What happens at a record that cannot be used: the run ends, or the record is skipped and counted."""
    chat_template: str | None = None
    """A chat template for the tokenizer, which is saved with it.

    A file (Jinja) relative to the recipe, ``chatml``, ``alpaca``, or the name of a template that TRL contains, such as
    ``llama3`` or ``qwen3``.
    """
    new_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tokens to add to the tokenizer if it lacks them; their embeddings are trained, and added if there are none."""
    max_length: Annotated[int, Field(gt=0)] = 1024
    """Maximum number of tokens in a row; longer rows are truncated at the end, and counted."""
    packing: bool = False
    """Pack several short rows into one of ``max_length``; no row attends to another, and positions restart in each."""
    streaming: bool = False
    """Read the data during training instead of before; needs ``training.max_steps``."""
    shuffle_buffer: Annotated[int, Field(gt=0)] = 1000
    """Number of rows in the buffer within which a stream is shuffled."""
    eval_path: str | None = None
    """A file, like ``path``, to evaluate on."""
    eval_split: str | None = None
    """A split of the dataset id to evaluate on."""
    eval_size: Annotated[int, Field(gt=0)] | Fraction | None = None
    """Number or fraction of rows held out of the training data for evaluation."""

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        """The sources of the training data; one if ``path`` is set."""
        return self.sources or (self._source(str(self.path), self.split),)

    @property
    def eval_source(self) -> DataSource | None:
        """The source of the evaluation data, unless they are held out of the training data or there are none."""
        if self.eval_path is None and self.eval_split is None:
            return None
        return self._source(self.eval_path or str(self.path), self.eval_split or self.split)

    @property
    def splits(self) -> bool:
        """Whether packing splits texts that are longer than ``max_length``, instead of truncating them."""
        return self.packing and all(source.format == "text" for source in self.train_sources)

    def _source(self, path: str, split: str) -> DataSource:
        given = {key: getattr(self, key) for key in _Records.model_fields if key in self.model_fields_set}
        return DataSource(path=path, **{**given, "split": split})

    @model_validator(mode="before")
    @classmethod
    def _inherited(cls, data: Any) -> Any:
        """Give each source the options under ``data`` that it does not set itself."""
        if not isinstance(data, dict) or not isinstance(data.get("sources"), (list, tuple)):
            return data
        common = {key: data[key] for key in _Records.model_fields if key in data}
        sources = [{**common, **source} if isinstance(source, dict) else source for source in data["sources"]]
        return {**data, "sources": sources}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.path is None) == (self.sources is None) or self.sources == ():
            raise ValueError("either path, or sources with at least one source")
        if self.format in LABELED:
            options = (
                "packing",
                "streaming",
                "system",
                "loss",
                "sources",
                "chat_template",
                "new_tokens",
                "on_bad_record",
            )
            for option in options:
                if option in self.model_fields_set:
                    raise ValueError(f"no {option} with format '{self.format}', which has labels")
        elif self.labels is not None:
            raise ValueError(f"no labels with format '{self.format}'")
        if sum(value is not None for value in (self.eval_path, self.eval_split, self.eval_size)) > 1:
            raise ValueError("only one of eval_path, eval_split and eval_size")
        if self.eval_split is not None and self.sources is not None:
            raise ValueError("eval_path or eval_size, not eval_split, with several sources")
        if self.streaming and isinstance(self.eval_size, float):
            raise ValueError("a number of rows as eval_size of streamed data, whose length is unknown")
        if self.streaming and self.eval_size is not None and self.sources is not None:
            raise ValueError("eval_path, not eval_size, for several streamed sources")
        if len({source.weight is None for source in self.train_sources}) > 1:
            raise ValueError("a weight for every source, or for none")
        if len(kinds := {source.format == "preference" for source in self.train_sources}) > 1:
            raise ValueError("either every source with format 'preference', or none")
        if kinds == {True} and (self.packing or self.streaming):
            raise ValueError("neither packing nor streaming with format 'preference'")
        return self


class Recipe(BaseModel):
    """``model``, ``task``, ``plugins``, ``load``, ``data``, ``training`` and ``nonfinite``; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str
    """A checkpoint directory or a Hub id."""
    task: Literal["text-generation", "image-text-to-text", "text-classification", "token-classification"] | None = None
    """What to train the model for; by default, the task of ``data.format``, or else of the class that the checkpoint
    names. Of a model that reads images, the language model is trained, on texts."""
    plugins: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    """Plugin name -> options."""
    load: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``from_pretrained``, verbatim."""
    data: DataConfig
    """What to train on."""
    training: dict[str, Any] = Field(default_factory=dict)
    """``trainer``, the name of one of TRL's trainers (``sft`` by default), and the fields of its config, verbatim."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What happens at a step whose loss or gradient is NaN or infinite.

    ``stop`` ends the run before the step changes the weights. ``skip`` skips the step; eleven in a row still end the
    run.
    """

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, data: Any) -> Any:
        """Drop sections with nothing under them, which YAML reads as null."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @model_validator(mode="before")
    @classmethod
    def _format_of_task(cls, recipe: Any) -> Any:
        """Set the format of the task, and the task of the format, where one is left out."""
        if not isinstance(recipe, dict) or not isinstance(data := recipe.get("data"), dict):
            return recipe
        form = data.get("format") or next((key for key, task in LABELED.items() if task == recipe.get("task")), None)
        task = recipe.get("task") or (LABELED.get(form) if isinstance(form, str) else None)
        named = {"data": {**data, "format": form}} if form else {}
        return {**recipe, **named, **({"task": task} if task else {})}

    @model_validator(mode="after")
    def _same_task(self) -> Self:
        labeled = LABELED.get(self.data.format)
        if labeled != self.task and (labeled or self.task in LABELED.values()):
            raise ValueError(f"data.format of the task '{self.task}', not '{self.data.format}'")
        return self

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a recipe from a file.

        Relative paths of data are resolved against its directory, as is that of a DeepSpeed configuration if the file
        exists there.

        Raises:
            ConfigError: if the recipe is invalid; one line with the key, what was found and what was expected.
        """
        try:
            recipe = cls.model_validate(read_yaml(path))
        except ValidationError as error:
            raise config_error(error, str(path), cls) from error
        data, directory = recipe.data, Path(path).parent
        beside: dict[str, Any] = {}
        if data.path is not None:
            beside["path"] = _beside(directory, data.path)
        if data.eval_path is not None:
            beside["eval_path"] = str(directory / data.eval_path)
        if data.sources is not None:
            beside["sources"] = tuple(
                source.model_copy(update={"path": _beside(directory, source.path)}) for source in data.sources
            )
        if data.chat_template is not None and (directory / data.chat_template).is_file():
            beside["chat_template"] = str(directory / data.chat_template)
        training = dict(recipe.training)
        if isinstance(deepspeed := training.get("deepspeed"), str) and (Path(path).parent / deepspeed).is_file():
            training["deepspeed"] = str(Path(path).parent / deepspeed)
        return recipe.model_copy(update={"data": data.model_copy(update=beside), "training": training})

    @property
    def trainer(self) -> Any:
        """What ``training.trainer`` names; ``sft`` if it is not set."""
        return self.training.get("trainer", "sft")

    @property
    def arguments(self) -> dict[str, Any]:
        """``training`` without ``trainer``: the fields of the trainer's config."""
        return {key: value for key, value in self.training.items() if key != "trainer"}


def _beside(directory: Path, path: str) -> str:
    """Return ``path`` relative to the recipe's ``directory``, unless it is the id of a dataset."""
    beside = directory / path
    return path if not beside.exists() and _may_be_an_id(path) else str(beside)


def _may_be_an_id(path: str) -> bool:
    return len(Path(path).parts) <= 2 and Path(path).suffix not in FILE_KINDS and not path.startswith((".", "/"))
