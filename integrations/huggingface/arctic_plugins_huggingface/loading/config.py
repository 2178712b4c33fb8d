"""The config, tokenizer and dtype of a checkpoint, and its model without data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
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
from arctic_plugins_huggingface.loading.tasks import check_task, task_name, task_of

__all__ = [
    "STORED",
    "auto_class_of",
    "device_of",
    "is_encoded",
    "is_quantized_otherwise",
    "load_config",
    "load_tokenizer",
    "only_hub",
    "resolve_dtype",
    "skeleton",
    "stored_dtype",
    "text_tokenizer",
]


def load_config(checkpoint: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """Read the config of a checkpoint directory or Hub id.

    Raises:
        CheckpointError: the config is missing, or is not the config of a model.
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
    except Exception as error:  # config classes run code: a bad value can raise anything
        _own_code(checkpoint, error)
        raise CheckpointError(
            f"{where} cannot be read as the config of a model: {one_line(error)}",
            expected="the config of a model",
            fix="correct the key that the error names",
        ) from error
    return config


def load_tokenizer(checkpoint: str | Path, *, processor: bool = False, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a checkpoint directory or Hub id.

    Args:
        checkpoint: directory or Hub id.
        processor: read the checkpoint's processor instead, if it has one. It contains the tokenizer.
        **kwargs: arguments of ``from_pretrained``.

    Raises:
        CheckpointError: the tokenizer is missing or damaged, or needs a package that is not installed.
    """
    directory = Path(checkpoint) / kwargs.get("subfolder", "")
    if (path := directory / "tokenizer_config.json").is_file():
        _check_tokenizer(path)
    if directory.is_dir() and not any((directory / name).is_file() for name in _PROCESSORS):
        processor = False
    reader, kind = (AutoProcessor, "processor") if processor else (AutoTokenizer, "tokenizer")
    try:
        found: PreTrainedTokenizerBase = reader.from_pretrained(checkpoint, **{"trust_remote_code": False, **kwargs})
        return found
    except BaseException as error:  # tokenizers raises bare Exceptions, and a BaseException if its Rust code panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        _own_code(checkpoint, error)
        fix = "save it next to the model again"
        if isinstance(error, ImportError):
            fix = "install the package that it names"
        raise CheckpointError(f"the {kind} of {checkpoint} cannot be read: {one_line(error)}", fix=fix) from error


def text_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a processor; ``tokenizer`` itself if it is not a processor."""
    found: PreTrainedTokenizerBase = getattr(tokenizer, "tokenizer", tokenizer)
    return found


_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def _check_tokenizer(path: Path) -> None:
    """Raise CheckpointError if a ``tokenizer_config.json`` names a class that is not a tokenizer, or other files."""
    config = read_json(path)
    named = config.get("tokenizer_class")
    if named is not None and not re.fullmatch(r"\w*(Tokenizer|TokenizerFast|Backend)", str(named)):
        raise CheckpointError(
            f"{path} has tokenizer_class {named!r}", expected="the name of a tokenizer class", fix="correct it"
        )
    if config.get("sp_model_kwargs"):
        raise CheckpointError(
            f"{path} has sp_model_kwargs",
            expected="no such key: it can name files",
            fix="remove it if you trust the rest",
        )


def _own_code(checkpoint: str | Path, error: BaseException) -> None:
    """Raise CheckpointError, naming the option to set, if ``error`` arose because the checkpoint contains its own code.

    By default, transformers would ask on the terminal.
    """
    if "trust_remote_code" in str(error):
        raise CheckpointError(
            f"{checkpoint} contains its own code, which is not executed",
            expected="a model that transformers or a plugin supports",
            fix="read the code and, if you trust it, set load: {trust_remote_code: true} in the recipe, or pass "
            "--trust-remote-code",
        ) from error


STORED = "stored"
"""Value of ``dtype`` that keeps the checkpoint's dtype on any device, for models that are saved, not computed with."""


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype that the checkpoint's config names; float32 if it names none."""
    found = getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def resolve_dtype(
    stored: torch.dtype, dtype: torch.dtype | str | None = "auto", device: str | None = None
) -> tuple[torch.dtype, str]:
    """Return the dtype to use for a checkpoint in ``stored``, and a line that explains it unless it is the obvious one.

    Raises:
        ConfigError: ``dtype`` is not the name of a floating-point dtype.
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
            expected="'auto', or the name of a floating-point dtype such as 'float32'",
            fix="correct load.dtype",
        )
    return named, warning_for(named, "dtype", "leave it out, or set it to float32", device)


def device_of(kwargs: Mapping[str, Any]) -> str:
    """Return the type of the device that will compute the model.

    It is the device that ``device_map`` names, else the one that the Trainer uses: the accelerator if there is one.
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


def is_quantized_otherwise(config: PreTrainedConfig) -> bool:
    """Return whether the checkpoint of ``config`` is quantized by another method than this project's."""
    return getattr(config, "quantization_config", None) is not None and not is_encoded(config)


def is_encoded(config: PreTrainedConfig) -> bool:
    """Return whether the checkpoint of ``config`` holds weights encoded by this project."""
    quantization = getattr(config, "quantization_config", None)
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, Mapping)
        else getattr(quantization, "quant_method", None)
    )
    return method == METHOD


def auto_class_of(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that loads a checkpoint for the task that its ``architectures`` names.

    ``AutoModelForCausalLM`` if it names none.
    """
    task = task_of(config)
    return AutoModelForCausalLM if task is None else task.auto_class


def skeleton(
    config: PreTrainedConfig,
    dtype: torch.dtype | None = None,
    *,
    auto_class: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the model of ``config`` on the meta device, as shapes without data.

    Args:
        config: the model's config.
        dtype: dtype of the parameters; by default, the checkpoint's.
        auto_class: the class of transformers that chooses the model's class; by default, :func:`auto_class_of`.
        trust_remote_code: whether the checkpoint's own code may be executed, if its model needs it.

    Raises:
        CheckpointError: ``auto_class`` has no model for ``config``, or it cannot be built.
    """
    chosen = stored_dtype(config) if dtype is None else dtype
    auto_class = auto_class or auto_class_of(config)
    check_task(config, auto_class)
    try:
        with torch.device("meta"):
            # Without the last argument, transformers would ask on the terminal.
            model: PreTrainedModel = auto_class.from_config(config, dtype=chosen, trust_remote_code=trust_remote_code)
            return model
    except Exception as error:  # model classes run code: a bad size can raise anything
        _own_code(config.name_or_path or "the checkpoint", error)
        raise CheckpointError(
            f"no model for {task_name(auto_class)} can be built from config.json (model_type {config.model_type}): "
            f"{one_line(error)}",
            fix="correct config.json",
        ) from error


def only_hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``from_pretrained`` arguments that also determine where a config and a tokenizer come from."""
    return {
        **hub_arguments(kwargs),
        **{key: kwargs[key] for key in ("trust_remote_code", "gguf_file") if key in kwargs},
    }
