"""Checks of checkpoints and adapters in vLLM's processes, however vLLM was started. Read in vllm 0.32.0."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import ConfigError, UserError
from arctic_plugins.patches import patch, patch_when_imported
from arctic_plugins.provenance import FILE_NAME, check_plugins, read_provenance
from arctic_plugins_vllm.about import SERVED, served
from arctic_plugins_vllm.compat import EngineArgs, init_logger

__all__ = ["check_model", "install"]

logger = init_logger(f"vllm.{__name__}")  # vLLM shows messages of INFO from its own loggers only
READ_IN = "vllm 0.32.0"
_refused: ContextVar[list[UserError] | None] = ContextVar("refused", default=None)


def install() -> None:
    """Make vLLM check models before it reads them, and adapters before it loads them. Idempotent."""
    why = "vLLM has no hook that sees a plain checkpoint before it is loaded"
    patch(EngineArgs, "create_engine_config", why=why, read_in=READ_IN)(create_engine_config)
    why = "vLLM does not compare an adapter with the base model, and loads one of other shapes in part"
    patch_when_imported("vllm.v1.engine.async_llm", "AsyncLLM", "add_lora", why=why, read_in=READ_IN)(add_lora)
    why = "vLLM reports an adapter that does not fit as an error of the server"
    patch_when_imported(
        "vllm.entrypoints.openai.models.serving", "OpenAIServingModels", "load_lora_adapter", why=why, read_in=READ_IN
    )(load_lora_adapter)


def create_engine_config(create: Callable[..., Any], arguments: Any, *others: Any, **keywords: Any) -> Any:
    """Check the model of ``arguments`` (EngineArgs), and log what it is once, in the main process."""
    check_model(arguments.model)
    config = create(arguments, *others, **keywords)
    if multiprocessing.parent_process() is None:
        logger.info("%s", served(config.model_config.model, config.additional_config).line())
    return config


def check_model(model: str) -> None:
    """Check that the plugins that made the checkpoint ``model`` are installed and work; warn about older ones.

    Raises:
        CheckpointError: its ``arctic_plugins.json`` is malformed, or in a newer format.
        PluginNotFoundError: a plugin is not installed.
        PluginLoadError: a plugin is broken.
    """
    if not (Path(model) / FILE_NAME).is_file():
        return
    provenance = read_provenance(model)
    check_plugins(provenance)
    failures = process_registry().failures
    for name in provenance.stack:
        if name in failures:
            raise failures[name]


async def add_lora(add: Callable[..., Any], engine: Any, request: Any) -> Any:
    """Check an adapter before the engine (AsyncLLM) loads it, at its start or while it runs.

    Raises:
        UserError: it does not belong on the engine's model; see :mod:`arctic_plugins_vllm.adapters`.
    """
    try:
        await asyncio.to_thread(check_request, engine.vllm_config, request.lora_name, request.lora_path)
    except UserError as error:
        if (refused := _refused.get()) is not None:
            refused.append(error)
        raise
    return await add(engine, request)


async def load_lora_adapter(load: Callable[..., Any], models: Any, *arguments: Any, **keywords: Any) -> Any:
    """Load an adapter as vLLM does; answer with status 400 if it was refused by :func:`add_lora`."""
    from http import HTTPStatus

    from vllm.entrypoints.serve import create_error_response

    refused: list[UserError] = []
    _refused.set(refused)
    result = await load(models, *arguments, **keywords)
    if refused:
        logger.warning("an adapter was refused: %s", refused[0])  # vLLM's answer has no paths
        return create_error_response(str(refused[0]), "BadRequestError", HTTPStatus.BAD_REQUEST)
    return result


def check_request(config: Any, name: str, path: str) -> None:
    """Check that the adapter in the directory ``path`` belongs on the model of ``config`` (VllmConfig).

    A path that is not a local directory is left to vLLM.

    Raises:
        UserError: it does not; the message contains the command that mends it.
    """
    from arctic_plugins.stack import Stack
    from arctic_plugins_vllm.adapters import Base, check_adapter, open_adapter
    from arctic_plugins_vllm.checkpoints import ON_THE_FLY, encoding_of, needed_overrides

    if not Path(path).is_dir():
        return
    adapter = open_adapter(path, name)
    model = Path(config.model_config.model)
    found = config.model_config.hf_config.to_dict()
    enabled = (config.additional_config or {}).get(SERVED)
    if ON_THE_FLY in (found.get("quantization_config") or {}):  # the files are plain
        del found["quantization_config"]
        encoding = encoding_of(model, found, Stack.from_dict(enabled)) if enabled else None
    else:
        encoding = encoding_of(model, found)
    check_adapter(adapter, Base(str(model), found, encoding))
    rank, most = adapter.arguments["max_lora_rank"], config.lora_config.max_lora_rank
    if rank > most:
        raise ConfigError(
            f"{adapter.path} needs rank {rank}, and the server was started for ranks up to {most}",
            fix=f"start it with '--lora {name}={adapter.path}', or with '--max-lora-rank {rank}'",
        )
    overrides = config.model_config.hf_overrides
    overrides = overrides if isinstance(overrides, dict) else {}
    for key, value in needed_overrides(adapter, model).items():
        if overrides.get(key, value if found.get(key) == value else None) != value:
            raise ConfigError(
                f"{adapter.path} changes '{key}' of its base to {value!r}, which the server was started without",
                fix=f"start it with '--lora {name}={adapter.path}'",
            )
