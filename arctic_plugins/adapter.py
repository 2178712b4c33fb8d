"""``adapter_config.json`` of an adapter in PEFT's format, read as an untrusted file.

The fields are those of peft 0.21.2.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from safetensors import safe_open

from arctic_plugins.errors import CheckpointError
from arctic_plugins.files import LONGEST_NAME, read_json
from arctic_plugins.plugin import config_error, expectation

__all__ = [
    "ADAPTER",
    "NAME",
    "OTHER_TYPES",
    "WEIGHTS",
    "AdapterConfig",
    "AnyAdapterConfig",
    "adapted_modules",
    "base_of",
    "read_adapter",
    "read_any_adapter",
    "whole_tensors",
]

ADAPTER = "adapter_config.json"
"""PEFT's file with the configuration of an adapter."""
WEIGHTS = "adapter_model.safetensors"
"""PEFT's file with the weights of an adapter."""

_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?A(?:\.weight)?")

NAME = r"^[\w.]+$"
"""The name of a module or parameter, or the end of such a name. PEFT also accepts regular expressions, which can be
crafted to run forever. This project never evaluates one.
"""
Name = Annotated[str, StringConstraints(pattern=NAME, max_length=1000)]
Names = Annotated[list[Name], Field(max_length=100_000)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=10_000_000)]
Rank = Annotated[int, Field(ge=1, le=65_536)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]


def _short(path: str) -> str:
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.split("/")):
        raise ValueError(f"names of at most {LONGEST_NAME} bytes")
    return path


def _plain_start(value: bool | str | None) -> bool | str | None:
    if isinstance(value, str) and value.lower() not in ("gaussian", "eva", "orthogonal", "mica"):
        raise ValueError("an initialization that leaves the base model as it is: true, 'gaussian', 'orthogonal', 'eva'")
    return value


Config = TypeVar("Config", bound="AnyAdapterConfig")
Base = Annotated[
    str, StringConstraints(max_length=4000, pattern=r"^([^-\x00-\x1f][^\x00-\x1f]*)?$"), AfterValidator(_short)
]


OTHER_TYPES = frozenset(
    {
        *("ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA"),
        *("IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA"),
        *("ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
    }
)
"""PEFT's types of adapters, other than LoRA, that are loaded and merged. vLLM serves none of them."""

Pattern = Annotated[Names | None, BeforeValidator(lambda value: None if isinstance(value, str) else value)]


class AnyAdapterConfig(BaseModel):
    """What adapters of all types have in common."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    peft_type: str
    base_model_name_or_path: Base | None = None
    """Directory or Hub id of the model that the adapter was trained on; see :func:`base_of`."""
    target_modules: Pattern = None
    """None if the file contains a regular expression (:func:`adapted_modules` returns what it matched) or no value
    (then PEFT chooses the modules for the model).
    """
    exclude_modules: Pattern = None
    modules_to_save: Names | None = None
    task_type: Name | None = None
    """PEFT's name of the task, for example ``SEQ_CLS``."""


class OtherAdapterConfig(AnyAdapterConfig):
    """The configuration of an adapter that is not LoRA.

    Its own fields are left to PEFT. None of them can be a regular expression, which PEFT would evaluate.
    """

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _check_texts(cls, content: Any) -> Any:
        for name, value in content.items():
            if name != "base_model_name_or_path":
                _check_names(name, value)
        return content


_NO_SIZE = re.compile(r".*(seed|_key|steps?)|tinit|tfinal|deltaT|n_frequency|theta_d_length|.*token_indices")
"""Fields whose numbers may be large: seeds, steps and ids, and sizes that PEFT compares with the weights."""


def _check_names(field: str, value: Any, depth: int = 0) -> None:
    if depth > 10:
        raise ValueError(f"lists within lists to a depth of 10 in {field}")
    if isinstance(value, dict):
        _check_names(field, [*value, *value.values()], depth)
    elif isinstance(value, list):
        for part in value:
            _check_names(field, part, depth + 1)
    elif isinstance(value, str) and not re.fullmatch(r"[\w.-]*", value):
        raise ValueError(f"names in {field}, not {value[:100]!r}")
    elif isinstance(value, int | float) and not abs(value) <= (2**31 if _NO_SIZE.fullmatch(field) else 65_536):
        raise ValueError(f"sizes of at most 65,536 in {field}")


class AdapterConfig(AnyAdapterConfig):
    """The configuration of a LoRA adapter.

    It contains the fields that are used here, and those that make PEFT do more than multiply matrices.
    """

    r: Rank = 8
    lora_alpha: Alpha = 8
    target_parameters: Names | None = None
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
    trainable_token_indices: dict[Name, Tokens] | Tokens | None = None
    alora_invocation_tokens: list[int] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    monteclora_config: dict[str, Any] | None = None
    init_lora_weights: Annotated[bool | str | None, AfterValidator(_plain_start)] = True
    """How the adapter was initialized. The methods refused (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) move part of the base
    weights into the adapter. The adapter then belongs on the remaining weights, which are not those of the model that
    :attr:`base_model_name_or_path` names."""
    layer_replication: None = None
    """Refused: it makes a model of any size out of a small file."""
    megatron_config: None = None
    """Refused: it makes PEFT import the module that ``megatron_core`` names."""

    @property
    def trained_tokens(self) -> frozenset[int]:
        """The tokens whose rows in the embedding, and in the head, the adapter replaces."""
        given = self.trainable_token_indices or []
        return frozenset().union(*given.values()) if isinstance(given, dict) else frozenset(given)


def read_adapter(directory: str | Path) -> AdapterConfig:
    """Read and check the ``adapter_config.json`` of a LoRA adapter in ``directory``.

    Raises:
        CheckpointError: the file is absent or malformed, or a field has a value that is refused; the message names it.
    """
    return _read(Path(directory) / ADAPTER, read_json(Path(directory) / ADAPTER), AdapterConfig)


def read_any_adapter(directory: str | Path) -> AnyAdapterConfig:
    """Read and check an ``adapter_config.json`` like :func:`read_adapter`, of LoRA or one of :data:`OTHER_TYPES`."""
    path = Path(directory) / ADAPTER
    content: dict[str, Any] = read_json(path)
    kind = content.get("peft_type", "LORA")
    if kind == "LORA":
        return _read(path, content, AdapterConfig)
    if kind not in OTHER_TYPES:
        raise CheckpointError(
            f"{path}: peft_type is {kind!r}",
            expected=f"LORA or one of {', '.join(sorted(OTHER_TYPES))}",
            fix="load the base model with load_model, and the adapter with PEFT",
        )
    return _read(path, content, OtherAdapterConfig)


def _read(path: Path, content: dict[str, Any], kind: type[Config]) -> Config:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = config_error(error, f"{path}:", kind)
        fix = "save the adapter again"
        if (*error.errors()[0]["loc"], None)[0] == "init_lora_weights":
            fix += (
                ", with PEFT's path_initial_model_for_weight_conversion: its initialization changed the base weights, "
                "so it does not fit the original base model"
            )
        elif not error.errors()[0]["loc"]:  # of the whole file
            found = str(path)
            raise CheckpointError(found, expected=expectation(error), fix=fix) from error
        raise CheckpointError(problem.found.replace(":.", ": ", 1), expected=problem.expected, fix=fix) from error


def adapted_modules(directory: str | Path) -> list[str]:
    """Return the names, in the base model, of the modules for which the adapter in ``directory`` has matrices.

    Raises:
        OSError, safetensors.SafetensorError: the adapter's weights cannot be read.
    """
    with safe_open(Path(directory) / WEIGHTS, "np") as file:
        found = (_MATRIX.fullmatch(key) for key in file.keys())  # noqa: SIM118 - safe_open is not a mapping
        return sorted({match[1] for match in found if match})


def whole_tensors(directory: str | Path) -> list[str]:
    """Return the names of the tensors that a LoRA adapter holds besides its matrices, as in the base model.

    They are embeddings that were resized or trained, biases, and modules that were trained as a whole. Weights under an
    adapter's own matrices, which PEFT saves for embeddings, are not among them.

    Raises:
        OSError, safetensors.SafetensorError: the adapter's weights cannot be read.
    """
    with safe_open(Path(directory) / WEIGHTS, "np") as file:
        names = (key.removeprefix("base_model.model.") for key in file.keys())  # noqa: SIM118 - safe_open is not a mapping
        return sorted(name for name in names if ".lora_" not in name and ".base_layer." not in name)


def base_of(directory: str | Path) -> str:
    """Return the base model that the adapter in ``directory`` names.

    Raises:
        CheckpointError: see :func:`read_adapter`; or the adapter names no base model.
    """
    base = read_any_adapter(directory).base_model_name_or_path
    if not base:
        raise CheckpointError(
            f"{Path(directory) / ADAPTER} names no base model",
            fix="pass --base, or set base_model_name_or_path in the file",
        )
    return base
