"""Reading what a checkpoint says of itself: its config, its tokenizer, its dtype, and the model without data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from arctic_plugins.compute import compute_dtype, default_device, reason_for, warning_for
from arctic_plugins.errors import ArcticError, CheckpointError, ConfigError, one_line
from arctic_plugins.files import check_keys, check_sizes, read_json
from arctic_plugins.frozen import (
    METHOD,
)
from arctic_plugins_huggingface.files.check import hub_arguments
from arctic_plugins_huggingface.loading.quantizer import register

__all__ = [
    "STORED",
    "device_of",
    "is_encoded",
    "load_config",
    "load_tokenizer",
    "only_hub",
    "resolve_dtype",
    "skeleton",
    "stored_dtype",
]


def load_config(checkpoint: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """Read the config of a checkpoint directory or hub id.

    Raises:
        CheckpointError: there is none, or it is not a model's.
    """
    register()
    directory, where = Path(checkpoint) / kwargs.get("subfolder", ""), f"{checkpoint}/config.json"
    try:
        content, _ = PreTrainedConfig.get_config_dict(checkpoint, **kwargs)
        check_keys(content, where)
        check_sizes(content, sorted(directory.glob("*.safetensors")) if directory.is_dir() else (), where)
        config = AutoConfig.from_pretrained(checkpoint, **{"trust_remote_code": False, **kwargs})
    except ArcticError:
        raise
    except Exception as error:  # configs are code: a bad value can raise anything
        _own_code(checkpoint, error)
        raise CheckpointError(
            f"{where} cannot be read as a model: {one_line(error)}",
            expected="a causal language model",
            fix="correct the key it names",
        ) from error
    return config


def load_tokenizer(checkpoint: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a checkpoint directory or hub id; raises CheckpointError when there is none or it is
    damaged.
    """
    path = Path(checkpoint) / kwargs.get("subfolder", "") / "tokenizer_config.json"
    if path.is_file():
        _check_tokenizer(path)
    try:
        return AutoTokenizer.from_pretrained(checkpoint, **{"trust_remote_code": False, **kwargs})
    except BaseException as error:  # tokenizers raises bare Exceptions, and of a panic of its Rust code a BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        _own_code(checkpoint, error)
        raise CheckpointError(
            f"the tokenizer of {checkpoint} cannot be read: {one_line(error)}", fix="save it beside the model again"
        ) from error


def _check_tokenizer(path: Path) -> None:
    """Raise CheckpointError if a ``tokenizer_config.json`` names a class of transformers that is no tokenizer, or
    another file.
    """
    config = read_json(path)
    named = config.get("tokenizer_class")
    if named is not None and not re.fullmatch(r"\w*(Tokenizer|TokenizerFast|Backend)", str(named)):
        raise CheckpointError(
            f"{path} has tokenizer_class {named!r}", expected="the name of a tokenizer", fix="correct it"
        )
    if config.get("sp_model_kwargs"):
        raise CheckpointError(
            f"{path} has sp_model_kwargs", expected="none: they name files", fix="remove them, if you trust the rest"
        )


def _own_code(checkpoint: str | Path, error: BaseException) -> None:
    """Say what to set if the error is that the checkpoint brings code of its own; the library's default would be to ask
    on the terminal.
    """
    if "trust_remote_code" in str(error):
        raise CheckpointError(
            f"{checkpoint} brings code of its own, which is not executed",
            expected="a model that transformers or a plugin knows",
            fix="read the code, and if you trust it set load: {trust_remote_code: true} in the recipe",
        ) from error


STORED = "stored"
"""As ``dtype``: that of the checkpoint, whatever the device; for a model that is saved again and not computed with."""


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint says it has."""
    found = getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def resolve_dtype(
    stored: torch.dtype, dtype: torch.dtype | str | None = "auto", device: str | None = None
) -> tuple[torch.dtype, str]:
    """What ``dtype`` stands for with a checkpoint in ``stored``, and a line to tell where that is not the obvious.

    Raises:
        ConfigError: ``dtype`` is not the name of a floating dtype.
    """
    if dtype in ("auto", None):
        chosen = compute_dtype(stored, device)
        return chosen, reason_for(stored, chosen, device)
    if dtype == STORED:
        return stored, ""
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ConfigError(
            f"dtype is {dtype!r}",
            expected="'auto', or the name of a floating dtype such as 'float32'",
            fix="correct load.dtype",
        )
    return named, warning_for(named, "dtype", "leave it out, or say float32", device)


def device_of(kwargs: Mapping[str, Any]) -> str:
    """Where the model will be computed: where ``device_map`` puts it, else where the Trainer does, on the accelerator
    if there is one.
    """
    device_map = kwargs.get("device_map")
    if isinstance(device_map, (str, torch.device)) and str(device_map) not in (
        "auto",
        "balanced",
        "balanced_low_0",
        "sequential",
    ):
        return torch.device(device_map).type
    return default_device()


def is_encoded(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint of ``config`` holds weights encoded by this project."""
    quantization = getattr(config, "quantization_config", None)
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, Mapping)
        else getattr(quantization, "quant_method", None)
    )
    return method == METHOD


def skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of ``config`` on the meta device: shapes without data. ``dtype`` defaults to the checkpoint's.

    Raises:
        CheckpointError: no causal language model can be built from it.
    """
    chosen = stored_dtype(config) if dtype is None else dtype
    try:
        with torch.device("meta"):
            # A config whose class is the checkpoint's own code was loaded with trust_remote_code; without it, the
            # library would ask on the terminal.
            trusted = type(config).__module__.startswith("transformers_modules")
            return AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=trusted)
    except Exception as error:  # models are code: a bad size can raise anything
        raise CheckpointError(
            f"no causal language model can be built from config.json (model_type {config.model_type}): "
            f"{one_line(error)}",
            fix="correct config.json",
        ) from error


def only_hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``from_pretrained``'s arguments that also says where a config and a tokenizer come from."""
    return {
        **hub_arguments(kwargs),
        **{key: kwargs[key] for key in ("trust_remote_code", "gguf_file") if key in kwargs},
    }
