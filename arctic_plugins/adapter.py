"""``adapter_config.json`` of a LoRA adapter, PEFT's format, read as a file that a stranger may have written. Fields as in peft 0.21.2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from arctic_plugins.errors import CheckpointError
from arctic_plugins.files import read_json
from arctic_plugins.plugin import config_error

__all__ = ["ADAPTER", "AdapterConfig", "base_of", "read_adapter"]

ADAPTER = "adapter_config.json"

Name = Annotated[str, StringConstraints(pattern=r"^[\w.]+$", max_length=1000)]
"""A module or parameter, or the end of one's name. PEFT takes regular expressions too, which can be made to run for ever."""
Names = Annotated[list[Name], Field(max_length=100_000)]
Rank = Annotated[int, Field(ge=1, le=65_536)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]


class AdapterConfig(BaseModel):
    """What an adapter says of itself: the fields that are used here, or that make PEFT do more than multiply matrices."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    base_model_name_or_path: Annotated[str, StringConstraints(max_length=4096, pattern=r"^([^-\x00-\x1f][^\x00-\x1f]*)?$")] | None = None
    """Directory or hub id of the model that it was trained on; see :func:`base_of`."""
    r: Rank = 8
    lora_alpha: Alpha = 8
    target_modules: Annotated[Names | None, BeforeValidator(lambda value: None if value == "all-linear" else value)] = None
    """None: what PEFT chooses for the model."""
    target_parameters: Names | None = None
    exclude_modules: Names | None = None
    modules_to_save: Names | None = None
    layers_pattern: Annotated[Names | None, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = None
    rank_pattern: Annotated[dict[Name, Rank], Field(max_length=100_000)] = {}
    alpha_pattern: Annotated[dict[Name, Alpha], Field(max_length=100_000)] = {}
    peft_type: Literal["LORA"] = "LORA"
    layer_replication: None = None
    """Makes a model of any size out of a small file."""
    megatron_config: None = None
    """Makes PEFT import the module that ``megatron_core`` names."""


def read_adapter(directory: str | Path) -> AdapterConfig:
    """Read and check the ``adapter_config.json`` in ``directory``.

    Raises:
        CheckpointError: absent, malformed, or a field has a value that is not taken from a file; names it.
    """
    path = Path(directory) / ADAPTER
    content: dict[str, Any] = read_json(path)
    try:
        return AdapterConfig.model_validate(content)
    except ValidationError as error:
        problem = config_error(error, f"{path}:", AdapterConfig)
        raise CheckpointError(problem.found.replace(":.", ": ", 1), expected=problem.expected, fix="save the adapter again") from error


def base_of(directory: str | Path) -> str:
    """The base model that the adapter in ``directory`` names.

    Raises:
        CheckpointError: see :func:`read_adapter`, or it names none.
    """
    base = read_adapter(directory).base_model_name_or_path
    if not base:
        raise CheckpointError(f"{Path(directory) / ADAPTER} names no base model", fix="give --base, or set its base_model_name_or_path")
    return base
