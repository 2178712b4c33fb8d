"""From a checkpoint to the options of vLLM's server; everything that can be known to fail is said before it starts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arctic_plugins.adapter import ADAPTER, WEIGHTS, adapted_modules, read_adapter
from arctic_plugins.compute import compute_dtype, dtype_name, is_native
from arctic_plugins.errors import CheckpointError, ConfigError, PluginNotFoundError
from arctic_plugins.files import check_directory, check_keys, check_sizes, read_json
from arctic_plugins.frozen import METHOD, ModuleCodecs
from arctic_plugins.host import service
from arctic_plugins.provenance import FILE_NAME, check_files, check_plugins, read_provenance
from arctic_plugins.recorded import stack_from_checkpoint
from arctic_plugins.stack import Stack

__all__ = ["made_for", "on_the_fly", "server_command", "server_options"]

MODULE = "arctic_plugins_vllm.server"
LONGEST_VALUES = 100_000
"""Characters of JSON on the command line: Linux takes 128 KiB as one argument."""
READ = {"config_format": "hf", "load_format": "safetensors"}
"""What vLLM reads of a model: not the ``params.json`` and ``consolidated.safetensors`` that it would prefer, which
nothing here has looked at, and no pickle (vllm 0.32.0: ``transformers_utils/config.py``, ``default_loader.py``)."""
CPU_CACHE_GIB = "2"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of ``CPUAttentionBackend.get_supported_head_sizes`` (vllm 0.32.0, ``v1/attention/backends/cpu_attn.py``). With others
the server starts, says that it is healthy, and dies of the first request."""


def on_the_fly(checkpoint: str, stack: Stack) -> dict[str, Any]:
    """``hf_overrides`` for ``LLM``, with which vLLM serves the plain ``checkpoint`` as ``stack`` says, encoding it
    while it is loaded.

    Raises:
        ConfigError: arctic-plugins-huggingface is not installed, the checkpoint is quantized already, or ``stack``
            changes nothing.
        ClaimError: plugins clash over a module.
    """
    planned_config = _service("planned_config")
    from arctic_plugins_vllm.quantization import ON_THE_FLY

    overrides: dict[str, Any] = planned_config(checkpoint, stack)
    if "quantization_config" in overrides:
        overrides["quantization_config"] = {**overrides["quantization_config"], ON_THE_FLY: True}
    return overrides


def _service(name: str) -> Callable[..., Any]:
    """:func:`arctic_plugins.host.service`; where there is none, the error names the distribution that has it."""
    try:
        return service(name)
    except PluginNotFoundError as error:
        raise ConfigError(
            f"plugins that change a model need arctic-plugins-huggingface ({error})",
            fix="pip install arctic-plugins-huggingface",
        ) from error


def server_command(values: Mapping[str, Any], options: Sequence[str]) -> list[str]:
    """Arguments for this Python that start the server with ``options``, verbatim, and ``values`` of
    :func:`server_options`.

    Raises:
        ConfigError: the values are too long for a command line.
    """
    written = json.dumps(values)
    if len(written) > LONGEST_VALUES:
        longest = max(values, key=lambda key: len(json.dumps(values[key])))
        raise ConfigError(
            f"vLLM's options take {len(written)} characters, most of them '{longest}'",
            expected=f"at most {LONGEST_VALUES}",
            fix="merge the adapter, or quantize the model, first",
        )
    return ["-m", MODULE, written, *options]


def server_options(
    checkpoint: str, options: Sequence[str] = (), *, base: str | None = None, plugins: Stack | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """With what to serve ``checkpoint``.

    Args:
        checkpoint: directory or hub id of a model, or directory of an adapter.
        options: of vLLM's server, verbatim; they win over what plugins set.
        base: the encoded base model of an adapter whose stack has a codec.
        plugins: what to make of a plain checkpoint while it is loaded.

    Returns:
        Options of vLLM's server (field names of ``EngineArgs`` and ``FrontendArgs``) with their values, and environment
            variables to add.

    Raises:
        HostVersionError: vLLM is not installed, or outside a plugin's range.
        CheckpointError: no checkpoint there, or one whose codec nobody here provides.
        ConfigError: an adapter over encoded weights without a base that is encoded alike, an adapter that names a
            directory of this machine as its base where ``base`` does not, or ``base`` for what is no adapter.
    """
    path = Path(os.path.abspath(checkpoint))  # so that "." has the name that an adapter is served under
    stack = stack_from_checkpoint(path) if (path / FILE_NAME).is_file() else Stack()
    stack.check_host("vllm")
    arguments: dict[str, Any] = {**READ, "model": checkpoint, **stack.vllm_engine_args(path)}
    is_adapter = (path / ADAPTER).is_file()
    if is_adapter and (path / FILE_NAME).is_file():
        check_directory(path)
        check_files(path)
        if not (path / WEIGHTS).is_file():  # or vLLM looks for a pickle
            raise CheckpointError(
                f"{path} has no {WEIGHTS}", fix="the adapter is incomplete: copy it again, or save it again"
            )
    if is_adapter and "lora_modules" not in arguments:
        raise CheckpointError(
            f"{checkpoint} is an adapter without {FILE_NAME}",
            expected="one that 'arctic train' wrote",
            fix="use vLLM's --lora-modules",
        )
    if base is not None:
        if not is_adapter:
            raise ConfigError(f"--base is for adapters, and {checkpoint} is none", fix="leave --base out")
        arguments["model"] = base
    if plugins is not None:
        if is_adapter:
            raise ConfigError(
                f"--plugins is for models, and {checkpoint} is an adapter",
                fix="quantize its base, and name that with --base",
            )
        if _option(options, "hf-overrides") is not None:
            raise ConfigError(
                "--plugins and --hf-overrides both say what the model's config is",
                expected="one of them",
                fix="quantize first",
            )
        arguments["hf_overrides"] = on_the_fly(checkpoint, plugins)
    if (
        is_adapter
        and base is None
        and _option(options, "model") is None
        and (named := Path(arguments["model"])).exists()
    ):
        raise ConfigError(
            f"{checkpoint} names {named.absolute()}, a directory of this machine, as its base",
            expected="a hub id, or your word that it is the one",
            fix=f"arctic serve {checkpoint} --base {named}",
        )
    model = Path((is_adapter and _option(options, "model")) or arguments["model"])
    config = _checked_config(model)
    is_encoded = _method(config) == METHOD
    if is_adapter and not is_encoded and stack.only("weight_codec"):
        names = ",".join(plugin.name for plugin in stack.only("weight_codec"))
        raise ConfigError(
            f"{checkpoint} was trained over encoded weights, and its base {model} is plain",
            fix=f"'arctic quantize {model} BASE --plugins {names}' and 'arctic serve {checkpoint} --base BASE', or "
            f"'arctic merge {checkpoint} OUT'",
        )
    others = stack.to_use().without("weight_codec", "placement", "adapter")
    if is_adapter and len(others):  # what a checkpoint of its own would say in its config
        overrides = _service("configured")(_service("load_config")(str(model)), others)
        arguments |= {"hf_overrides": overrides} if overrides else {}
    if is_adapter and _is_mixture(config):
        targets = read_adapter(path).target_modules or {name.rpartition(".")[2] for name in adapted_modules(path)}
        if targets:  # or vLLM prepares experts for adapters too, which takes memory, and on CPU Triton
            arguments["lora_target_modules"] = sorted(targets)
    if (size := made_for(model)) is not None:
        given = _option(options, "tensor-parallel-size")
        if given is not None and given != str(size):
            raise ConfigError(
                f"{model} was made for {size} processes, and --tensor-parallel-size is {given}",
                fix="leave the option out, or make the checkpoint again with another --tensor-parallel, or without",
            )
        arguments.update(load_format="sharded_state", tensor_parallel_size=size)
    wanted = stack.only("weight_codec").to_dict()
    if is_adapter and wanted and (model / FILE_NAME).is_file():
        found = read_provenance(model).stack
        if any(found.get(name) != encoding for name, encoding in wanted.items()):
            raise ConfigError(
                f"{checkpoint} was trained over weights encoded by {wanted}, and {model} was made with {found}",
                fix="encode the base with the plugins of the adapter's arctic_plugins.json",
            )
    environment = {}
    if _option(options, "dtype") is None and (dtype := _dtype(config)) is not None:
        arguments["dtype"] = dtype
    if _runs_on_cpu():
        _check_heads(config, model)
        if (is_encoded or plugins is not None) and "--no-enforce-eager" not in options:
            # Compiling takes about a minute. A model of 1.1B parameters in fp8 then generates a sixth faster
            # (docs/fp8.md).
            arguments["enforce_eager"] = True
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            environment["VLLM_CPU_KVCACHE_SPACE"] = CPU_CACHE_GIB  # unset, vLLM takes most of the machine's memory
        if size is not None and size > 1 and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = _shared_cores(
                size
            )  # unset, vLLM wants a NUMA node for each process
    return arguments, environment


def made_for(model: Path) -> int | None:
    """For how many tensor parallel processes a checkpoint has files of their own (vllm 0.32.0:
    ``sharded_state_loader.py``); None for others.
    """
    names = (re.match(r"model-rank-(\d+)-part-", path.name) for path in model.glob("model-rank-*.safetensors"))
    ranks = {int(name[1]) for name in names if name}
    if ranks and ranks != set(range(len(ranks))):
        raise CheckpointError(
            f"{model} has files of the processes {sorted(ranks)[:3]}...",
            expected="all from 0 on",
            fix="copy it again, or make it again",
        )
    return len(ranks) or None


def _is_mixture(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` speaks of experts, by one of the names of ``ModelConfig.get_num_experts`` (vllm
    0.32.0).
    """
    return any(config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def _check_heads(config: Mapping[str, Any], model: Path) -> None:
    """Raise CheckpointError if the heads of ``model``, by its ``config``, have a size that vLLM's attention on CPU does
    not.
    """
    nested = config.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, dict) else config
    size, hidden, heads = (text.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if size is None and type(hidden) is int and type(heads) is int and heads > 0:
        size = hidden // heads
    if (
        type(size) is int and size not in CPU_HEAD_SIZES and "kv_lora_rank" not in text
    ):  # which has heads of several sizes
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        raise CheckpointError(
            f"{model} has heads of {size}",
            expected=f"one of {sizes} in vLLM on CPU",
            fix="generate with 'arctic generate'",
        )


def _shared_cores(size: int) -> str:
    """This process's cores in ``size`` parts, as ``VLLM_CPU_OMP_THREADS_BIND`` names them; all for everybody where
    there are fewer.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    each = len(cores) // size
    return (
        "|".join(",".join(map(str, cores[part * each : (part + 1) * each])) for part in range(size))
        if each
        else "nobind"
    )


def _checked_config(model: Path) -> dict[str, Any]:
    """The ``config.json`` of a model that can be served; empty for a hub id, which is left to vLLM.

    Raises:
        CheckpointError: the directory holds no model, or one that is damaged or of a newer format.
        PluginNotFoundError: a codec's plugin is not installed; names the distribution.
    """
    if not (model / "config.json").is_file():
        if not model.exists() and _HUB_ID.fullmatch(str(model)) and ".." not in str(model):
            return {}
        raise CheckpointError(
            f"{model} has no config.json", expected="a checkpoint directory or a hub id", fix="correct the path"
        )
    check_directory(model)
    config = read_json(model / "config.json")
    check_keys(config, model / "config.json")
    check_sizes(config, sorted(model.glob("*.safetensors")), model / "config.json")
    if _method(config) == METHOD:
        if (model / FILE_NAME).is_file():
            check_plugins(read_provenance(model))
            check_files(model)
        ModuleCodecs.from_config(config["quantization_config"])
    return config


def _method(config: Mapping[str, Any]) -> Any:
    """By which a ``config.json`` says that weights are quantized."""
    quantization = config.get("quantization_config")
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def _dtype(config: Mapping[str, Any]) -> str | None:
    """What to tell vLLM to compute in: None where its own choice (the checkpoint's dtype, bfloat16 for float32:
    ``config/model.py`` ``_resolve_auto_dtype``, vllm 0.32.0) is one that the device multiplies natively."""
    import torch

    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    vllms = named if isinstance(named, torch.dtype) and named != torch.float32 else torch.bfloat16
    return None if is_native(vllms) else dtype_name(compute_dtype(vllms))


def _option(options: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE`` among ``options``; vLLM takes underscores for dashes."""
    for at, option in enumerate(options):
        flag, given, value = option.partition("=")
        if flag.replace("_", "-") == f"--{name}":
            return value if given else next(iter(options[at + 1 :]), None)
    return None


def _runs_on_cpu() -> bool:
    import torch

    return not torch.accelerator.is_available()
