"""``adapter_config.json`` of a LoRA adapter, PEFT's format, read as a file that a stranger may have written. Fields as
in peft 0.21.2.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from safetensors import safe_open

from arctic_plugins.errors import CheckpointError
from arctic_plugins.files import LONGEST_NAME, read_json
from arctic_plugins.plugin import config_error

__all__ = ["ADAPTER", "WEIGHTS", "AdapterConfig", "adapted_modules", "base_of", "read_adapter"]

ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?A(?:\.weight)?")

Name = Annotated[str, StringConstraints(pattern=r"^[\w.]+$", max_length=1000)]
"""A module or parameter, or the end of one's name. PEFT takes regular expressions too, which can be made to run for
ever: none is evaluated.
"""
Names = Annotated[list[Name], Field(max_length=100_000)]
Rank = Annotated[int, Field(ge=1, le=65_536)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]


def _short(path: str) -> str:
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.split("/")):
        raise ValueError(f"names of at most {LONGEST_NAME} bytes")
    return path


def _plain_start(value: bool | str | None) -> bool | str | None:
    if isinstance(value, str) and value.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga"):
        raise ValueError("a start that leaves the base model as it is: true, 'gaussian', 'orthogonal', 'eva'")
    return value


Base = Annotated[
    str, StringConstraints(max_length=4000, pattern=r"^([^-\x00-\x1f][^\x00-\x1f]*)?$"), AfterValidator(_short)
]


class AdapterConfig(BaseModel):
    """What an adapter says of itself: the fields that are used here, or that make PEFT do more than multiply
    matrices.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    base_model_name_or_path: Base | None = None
    """Directory or hub id of the model that it was trained on; see :func:`base_of`."""
    r: Rank = 8
    lora_alpha: Alpha = 8
    target_modules: Annotated[
        Names | None, BeforeValidator(lambda value: None if isinstance(value, str) else value)
    ] = None
    """None where the file has an expression (of which :func:`adapted_modules` is the result) or nothing (PEFT chooses
    for the model).
    """
    target_parameters: Names | None = None
    exclude_modules: Annotated[
        Names | None, BeforeValidator(lambda value: None if isinstance(value, str) else value)
    ] = None
    modules_to_save: Names | None = None
    layers_pattern: Annotated[
        Names | None, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ] = None
    rank_pattern: Annotated[dict[Name, Rank], Field(max_length=100_000)] = {}
    alpha_pattern: Annotated[dict[Name, Alpha], Field(max_length=100_000)] = {}
    peft_type: Literal["LORA"] = "LORA"
    bias: Literal["none", "all", "lora_only"] = "none"
    use_dora: bool = False
    use_qalora: bool = False
    lora_bias: bool = False
    init_lora_weights: Annotated[bool | str | None, AfterValidator(_plain_start)] = True
    """How it was drawn. Other ways (PiSSA, OLoRA, CorDA, LoftQ) take from the base what they give the adapter, which
    belongs on the rest: that is not the model that :attr:`base_model_name_or_path` names."""
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
        fix = "save the adapter again"
        if error.errors()[0]["loc"][0] == "init_lora_weights":
            fix += (
                ", with PEFT's path_initial_model_for_weight_conversion: it was started from the weights of its "
                "base, and belongs on what was left"
            )
        raise CheckpointError(problem.found.replace(":.", ": ", 1), expected=problem.expected, fix=fix) from error


def adapted_modules(directory: str | Path) -> list[str]:
    """The names, in the base model, of the modules for which the adapter in ``directory`` has matrices.

    Raises:
        OSError, SafetensorError: its weights cannot be read.
    """
    with safe_open(Path(directory) / WEIGHTS, "np") as file:
        found = (_MATRIX.fullmatch(key) for key in file.keys())  # noqa: SIM118 - safe_open is not a mapping
        return sorted({match[1] for match in found if match})


def base_of(directory: str | Path) -> str:
    """The base model that the adapter in ``directory`` names.

    Raises:
        CheckpointError: see :func:`read_adapter`, or it names none.
    """
    base = read_adapter(directory).base_model_name_or_path
    if not base:
        raise CheckpointError(
            f"{Path(directory) / ADAPTER} names no base model", fix="give --base, or set its base_model_name_or_path"
        )
    return base
