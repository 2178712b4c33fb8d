"""``adapter_config.json`` of a LoRA adapter in PEFT's format, read as an untrusted file.

The fields are those of peft 0.21.2.
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
"""The name of a module or parameter, or the end of such a name. PEFT also accepts regular expressions, which can be
crafted to run forever. This project never evaluates one.
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
        raise ValueError("an initialization that leaves the base model as it is: true, 'gaussian', 'orthogonal', 'eva'")
    return value


Base = Annotated[
    str, StringConstraints(max_length=4000, pattern=r"^([^-\x00-\x1f][^\x00-\x1f]*)?$"), AfterValidator(_short)
]


class AdapterConfig(BaseModel):
    """The configuration of an adapter.

    It contains the fields that are used here, and those that make PEFT do more than multiply matrices.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    base_model_name_or_path: Base | None = None
    """Directory or Hub id of the model that the adapter was trained on; see :func:`base_of`."""
    r: Rank = 8
    lora_alpha: Alpha = 8
    target_modules: Annotated[
        Names | None, BeforeValidator(lambda value: None if isinstance(value, str) else value)
    ] = None
    """None if the file contains a regular expression (:func:`adapted_modules` returns what it matched) or no value
    (then PEFT chooses the modules for the model).
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
    task_type: Name | None = None
    """PEFT's name of the task, for example ``SEQ_CLS``."""
    bias: Literal["none", "all", "lora_only"] = "none"
    use_dora: bool = False
    use_qalora: bool = False
    lora_bias: bool = False
    init_lora_weights: Annotated[bool | str | None, AfterValidator(_plain_start)] = True
    """How the adapter was initialized. The refused methods (PiSSA, OLoRA, CorDA, LoftQ) move a part of the base weights
    into the adapter. The adapter then belongs on the remaining weights, which are not those of the model that
    :attr:`base_model_name_or_path` names."""
    layer_replication: None = None
    """Refused: it makes a model of any size out of a small file."""
    megatron_config: None = None
    """Refused: it makes PEFT import the module that ``megatron_core`` names."""


def read_adapter(directory: str | Path) -> AdapterConfig:
    """Read and check the ``adapter_config.json`` in ``directory``.

    Raises:
        CheckpointError: the file is absent or malformed, or a field has a value that is refused; the message names it.
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
                ", with PEFT's path_initial_model_for_weight_conversion: its initialization changed the base weights, "
                "so it does not fit the original base model"
            )
        raise CheckpointError(problem.found.replace(":.", ": ", 1), expected=problem.expected, fix=fix) from error


def adapted_modules(directory: str | Path) -> list[str]:
    """Return the names, in the base model, of the modules for which the adapter in ``directory`` has matrices.

    Raises:
        OSError, SafetensorError: the adapter's weights cannot be read.
    """
    with safe_open(Path(directory) / WEIGHTS, "np") as file:
        found = (_MATRIX.fullmatch(key) for key in file.keys())  # noqa: SIM118 - safe_open is not a mapping
        return sorted({match[1] for match in found if match})


def base_of(directory: str | Path) -> str:
    """Return the base model that the adapter in ``directory`` names.

    Raises:
        CheckpointError: see :func:`read_adapter`; or the adapter names no base model.
    """
    base = read_adapter(directory).base_model_name_or_path
    if not base:
        raise CheckpointError(
            f"{Path(directory) / ADAPTER} names no base model",
            fix="pass --base, or set base_model_name_or_path in the file",
        )
    return base
