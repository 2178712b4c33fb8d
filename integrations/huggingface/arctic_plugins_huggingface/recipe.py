"""A recipe: everything about one fine-tuning run in one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arctic_plugins.plugin import config_error
from arctic_plugins.stack import read_yaml

__all__ = ["DataConfig", "Recipe"]


class DataConfig(BaseModel):
    """What to train on. A relative ``path`` is taken from the recipe's directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """A JSON or JSONL file."""
    format: Literal["alpaca"] = "alpaca"
    """``alpaca``: records with ``instruction``, ``output`` and an optional ``input``."""
    system: str | None = None
    """System message of every row; without one the chat template decides."""
    max_length: int = Field(default=1024, gt=0)
    """Tokens of a row, prompt and answer; what is longer is cut at the end."""


class Recipe(BaseModel):
    """``model``, ``plugins``, ``load``, ``data`` and ``training``; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """A checkpoint directory or a hub id."""
    plugins: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    """Plugin name -> options."""
    load: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``from_pretrained``, verbatim."""
    data: DataConfig
    training: dict[str, Any] = Field(default_factory=dict)
    """``TrainingArguments``, verbatim (and the fields that TRL's ``SFTConfig`` adds to them)."""

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a recipe.

        Raises:
            ConfigError: one line with the key, what was found and what was expected.
        """
        try:
            recipe = cls.model_validate(read_yaml(path))
        except ValidationError as error:
            raise config_error(error, str(path), cls) from error
        data = recipe.data.model_copy(update={"path": str(Path(path).parent / recipe.data.path)})
        return recipe.model_copy(update={"data": data})
