"""Recipes: everything about a fine-tuning run in one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arctic_plugins.plugin import config_error
from arctic_plugins.stack import read_yaml

__all__ = ["FILE_KINDS", "DataConfig", "Recipe"]

FILE_KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
"""Suffixes of files; a name that ends with one is never a dataset id."""
Format = Literal["alpaca", "messages", "prompt_completion", "text", "classification", "token_classification"]
LABELED = {"classification": "text-classification", "token_classification": "token-classification"}
"""Format -> the task for which its records have labels."""


class DataConfig(BaseModel):
    """What to train on, and which tokens the loss covers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """A JSON, JSONL, CSV, TSV or Parquet file, relative to the recipe, or an id for ``datasets.load_dataset``."""
    format: Format = "alpaca"
    """The fields of a record.

    ``alpaca``: ``instruction``, ``output``, and optionally ``input``, ``system`` and ``history``. ``messages``: a chat,
    as ``messages`` (``role`` and ``content``) or ``conversations`` (``from`` and ``value``), optionally with ``system``
    and ``tools``. ``prompt_completion``: ``prompt`` and ``completion``, both strings or both lists of messages.
    ``text``: ``text``. ``classification``: ``text`` (and ``text_pair``) and ``label``, a class, a list of classes, or a
    number to predict. ``token_classification``: ``tokens``, a list of words, and ``tags``, a class for each.
    """
    labels: tuple[str, ...] | None = None
    """The classes of labeled data, in the order of their numbers; by default, those of the model or all in ``path``."""
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
    eval_size: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Number or fraction of rows held out of the training data for evaluation."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.format == "text" and self.loss == "completion" and "loss" in self.model_fields_set:
            raise ValueError("loss 'all' for format 'text', which has no completions")
        if self.format in LABELED:
            for option in ("packing", "streaming", "system", "loss"):
                if option in self.model_fields_set:
                    raise ValueError(f"no {option} with format '{self.format}', which has labels")
        elif self.labels is not None:
            raise ValueError(f"no labels with format '{self.format}'")
        if sum(value is not None for value in (self.eval_path, self.eval_split, self.eval_size)) > 1:
            raise ValueError("only one of eval_path, eval_split and eval_size")
        if self.streaming and isinstance(self.eval_size, float):
            raise ValueError("a number of rows as eval_size of streamed data, whose length is unknown")
        return self


class Recipe(BaseModel):
    """``model``, ``task``, ``plugins``, ``load``, ``data``, ``training`` and ``nonfinite``; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    training: dict[str, Any] = Field(default_factory=dict)
    """``TrainingArguments``, verbatim (and the fields that TRL's ``SFTConfig`` adds to them)."""
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
        beside = {
            key: str(Path(path).parent / value)
            for key in ("path", "eval_path")
            if (value := getattr(recipe.data, key)) is not None
        }
        if not Path(beside["path"]).exists() and _may_be_an_id(recipe.data.path):
            del beside["path"]
        training = dict(recipe.training)
        if isinstance(deepspeed := training.get("deepspeed"), str) and (Path(path).parent / deepspeed).is_file():
            training["deepspeed"] = str(Path(path).parent / deepspeed)
        return recipe.model_copy(update={"data": recipe.data.model_copy(update=beside), "training": training})


def _may_be_an_id(path: str) -> bool:
    return len(Path(path).parts) <= 2 and Path(path).suffix not in FILE_KINDS and not path.startswith((".", "/"))
