"""Options of vLLM's server for a checkpoint; everything that can be known to fail is reported before it starts."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arctic_plugins.adapter import ADAPTER
from arctic_plugins.compute import compute_dtype, dtype_name, is_native
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.files import check_directory, check_keys, check_sizes, read_json
from arctic_plugins.frozen import METHOD, ModuleCodecs
from arctic_plugins.provenance import FILE_NAME, check_files, check_plugins, read_provenance
from arctic_plugins.recorded import stack_from_checkpoint
from arctic_plugins.stack import Stack
from arctic_plugins_vllm.adapters import Adapter, Base, check_adapter, engine_arguments, open_adapter
from arctic_plugins_vllm.checkpoints import check_names, encoding_of, made_for, method_of, needed_overrides, on_the_fly

__all__ = ["check_address", "engine_args", "server_command", "server_options"]

MODULE = "arctic_plugins_vllm.server"
LONGEST_VALUES = 100_000
"""The maximum number of characters of JSON on the command line: Linux accepts 128 KiB per argument."""
READ = {"config_format": "hf", "load_format": "safetensors"}
"""Options that make vLLM read only files that are checked here.

They exclude pickles, and the ``params.json`` and ``consolidated.safetensors`` that vLLM would prefer (vllm 0.32.0:
``transformers_utils/config.py``, ``default_loader.py``).
"""
CPU_CACHE_GIB = "2"
PORT = "8000"
"""vLLM's default port."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HEADLESS = re.compile(r"\w+(?<!LMHead)(?<!Chat)(?<!Reward)(?<!Classification)Model")
"""A model class without a head, whose outputs are embeddings: the default suffix of vLLM (0.32.0, config/model.py)."""
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""The sizes in ``CPUAttentionBackend.get_supported_head_sizes`` (vllm 0.32.0, ``v1/attention/backends/cpu_attn.py``).

With other sizes the server starts, reports that it is healthy, and dies on the first request.
"""


def engine_args(
    checkpoint: str, plugins: Mapping[str, Any] | None = None, *, base: str | None = None, **given: Any
) -> dict[str, Any]:
    """Return arguments for ``LLM`` or ``AsyncEngineArgs`` that run ``checkpoint`` as ``arctic serve`` does.

    ::

        llm = LLM(**engine_args("merged", {"speculate": {}}, max_model_len=4096))

    For an adapter they are those of its base model; pass the adapter to ``generate`` as a ``LoRARequest``.

    Args:
        checkpoint: directory or Hub id of a model, or directory of an adapter.
        plugins: names of plugins with their options, as in ``arctic serve --plugins``.
        base: the encoded base model of an adapter whose stack has a codec.
        given: further arguments, which take precedence.

    Raises:
        UserError: see :func:`server_options`.
    """
    flags = {True: "--{}", False: "--no-{}"}
    options = [
        flags[value].format(name.replace("_", "-"))
        if isinstance(value, bool)
        else f"--{name.replace('_', '-')}={value}"
        for name, value in given.items()
        if value is not None
    ]
    stack = None if plugins is None else Stack.from_dict(plugins)
    values, _ = server_options(checkpoint, options, base=base, plugins=stack)
    return {**{name: value for name, value in values.items() if name != "lora_modules"}, **given}


def server_command(values: Mapping[str, Any], options: Sequence[str]) -> list[str]:
    """Return the arguments for Python that start the server with ``values`` of :func:`server_options`.

    ``options`` are passed verbatim.

    Raises:
        ConfigError: the values are too long for a command line.
    """
    written = json.dumps(values)
    if len(written) > LONGEST_VALUES:
        longest = max(values, key=lambda key: len(json.dumps(values[key])))
        raise ConfigError(
            f"vLLM's options take {len(written)} characters, most of them for '{longest}'",
            expected=f"at most {LONGEST_VALUES}",
            fix="first merge the adapter or quantize the model",
        )
    return ["-m", MODULE, written, *options]


def check_address(options: Sequence[str]) -> None:
    """Raise ConfigError if the server cannot listen on the address in ``options``, vLLM's, for example one in use.

    vLLM (0.32.0, ``launcher.py``) would find out after the files have been checked. So it does for an address in its
    ``--config FILE``, and after loading the model for one of a server that was starting at the same time.
    """
    host, port = _option(options, "host") or "", _option(options, "port") or PORT
    given = {option.partition("=")[0].replace("_", "-") for option in options}
    if given & {"--uds", "--config", "--headless"} or not port.isdecimal():
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # like vLLM; a server may be started again at once
        try:
            probe.bind((host, int(port)))
        except (OSError, OverflowError, TypeError, ValueError) as error:  # also names that are no host's
            raise ConfigError(
                f"the server cannot listen on {host or 'all addresses'}, port {port}: "
                f"{getattr(error, 'strerror', None) or error}",
                fix="set --port or --host to another",
            ) from error


def server_options(
    checkpoint: str,
    options: Sequence[str] = (),
    *,
    base: str | None = None,
    plugins: Stack | None = None,
    adapters: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the options and environment variables with which to serve ``checkpoint``.

    Args:
        checkpoint: directory or Hub id of a model, or directory of an adapter.
        options: options of vLLM's server, verbatim; they take precedence over those that plugins set.
        base: the encoded base model of an adapter whose stack has a codec.
        plugins: a stack in addition to the one that the checkpoint records, and in place of its plugins of the same
            name. Plugins that concern the model encode or change a plain checkpoint while it is loaded. Those that only
            configure vLLM work with every checkpoint.
        adapters: name in requests -> directory of further adapters in PEFT's format.

    Returns:
        Options of vLLM's server (field names of ``EngineArgs`` and ``FrontendArgs``) with their values, and environment
            variables to add.

    Raises:
        HostVersionError: vLLM is not installed, or its version is outside a plugin's range.
        CheckpointError: there is no checkpoint, or no installed plugin provides its codec.
        ConfigError: an adapter was trained over encoded weights and its base is not encoded in the same way, or over
            a model of other shapes; adapters need different settings of the base; the adapter names a local directory
            as its base and ``base`` does not confirm it; ``base`` is given for a model that is not an adapter; or
            ``plugins`` do nothing in vLLM.
        UserError: a plugin's ``vllm_check`` raised it.
    """
    path = Path(os.path.abspath(checkpoint))  # so that "." gets a name under which an adapter can be served
    is_adapter = (path / ADAPTER).is_file()
    served = [open_adapter(path)] if is_adapter else []
    served += [open_adapter(directory, name) for name, directory in (adapters or {}).items()]
    if adapters and _option(options, "lora-modules") is not None:
        raise ConfigError(
            "--lora and vLLM's --lora-modules both name adapters", expected="one of them", fix="use --lora for all"
        )
    recorded = stack_from_checkpoint(path) if not is_adapter and (path / FILE_NAME).is_file() else Stack()
    stack = served[0].stack if is_adapter else recorded
    whole = stack if plugins is None else stack.updated(plugins)
    for each in (whole, *(adapter.stack for adapter in served)):
        each.check_host("vllm")
    trusted = any(option.replace("_", "-") == "--trust-remote-code" for option in options)
    arguments: dict[str, Any] = {**READ, "model": checkpoint, **whole.vllm_engine_args(path)}
    if base is not None:
        if not is_adapter:
            raise ConfigError(f"--base is for adapters, and {checkpoint} is not an adapter", fix="leave --base out")
        arguments["model"] = base
    encoding = Stack() if plugins is None else plugins.of_model()
    if len(encoding):
        if is_adapter:
            raise ConfigError(
                f"--plugins has '{next(iter(encoding)).name}', which changes models, and {checkpoint} is an adapter",
                fix="quantize its base, and pass the result with --base",
            )
        if _option(options, "hf-overrides") is not None:
            raise ConfigError(
                "--plugins and --hf-overrides both set the model's config",
                expected="one of them",
                fix="quantize first",
            )
        arguments["hf_overrides"] = on_the_fly(checkpoint, encoding, trust_remote_code=trusted)
    elif plugins is not None and not plugins.vllm_engine_args(path):
        raise ConfigError(
            f"--plugins {','.join(plugin.name for plugin in plugins)} does nothing in vLLM",
            expected="plugins that encode weights, such as fp8, or that configure vLLM, such as speculate",
            fix="leave it out",
        )
    if (
        is_adapter
        and base is None
        and _option(options, "model") is None
        and (named := Path(arguments["model"])).exists()
    ):
        raise ConfigError(
            f"{checkpoint} names {named.absolute()}, a local directory, as its base",
            expected="a Hub id, or your confirmation that this is the base",
            fix=f"arctic serve {checkpoint} --base {named}",
        )
    model = Path((is_adapter and _option(options, "model")) or arguments["model"])
    config = _checked_config(model)
    is_encoded = method_of(config) == METHOD
    if served:
        _check_names([_option(options, "served-model-name") or str(model), *(adapter.name for adapter in served)])
        arguments.pop("tokenizer", None)
        arguments |= engine_arguments(served, is_mixture=_is_mixture(config))
        under = Base(str(model), config, encoding_of(model, config, plugins))
        for adapter in served:
            check_adapter(adapter, under)
        if overrides := _joint_overrides(served, model, trusted):
            arguments["hf_overrides"] = {**arguments.get("hf_overrides", {}), **overrides}
    if (size := made_for(model)) is not None:
        given = _option(options, "tensor-parallel-size")
        if given is not None and given != str(size):
            raise ConfigError(
                f"{model} was made for {size} processes, but --tensor-parallel-size is {given}",
                fix="leave the option out, or create the checkpoint again with another --tensor-parallel, or without",
            )
        arguments.update(load_format="sharded_state", tensor_parallel_size=size)
    if _option(options, "runner") is None and _is_headless(config):
        arguments["runner"] = "pooling"  # otherwise vLLM takes LlamaModel, for example, for LlamaForCausalLM
    if _option(options, "dtype") is None and (dtype := _dtype(config)) is not None:
        arguments["dtype"] = dtype
    whole.vllm_check({**arguments, **_given(options)}, config)
    environment = {}
    if _runs_on_cpu():
        _check_heads(config, model)
        if (is_encoded or len(encoding)) and "--no-enforce-eager" not in options:
            # Compilation takes about a minute. A 1.1B model in fp8 then generates a sixth faster (docs/fp8.md).
            arguments["enforce_eager"] = True
        speculative = arguments.get("speculative_config") or {}
        if speculative.get("method") == "ngram" and "NUMBA_NUM_THREADS" not in os.environ:
            # vLLM's n-grams use one of numba's threads, but starting those gives OpenMP a thread for each core on top
            # of those that vLLM has bound; on busy cores a step then took 70 times as long (vllm 0.32.0, numba 0.65.0).
            environment["NUMBA_NUM_THREADS"] = "1"
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            environment["VLLM_CPU_KVCACHE_SPACE"] = CPU_CACHE_GIB  # if unset, vLLM takes most of the machine's memory
        if size is not None and size > 1 and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = _shared_cores(
                size
            )  # if unset, vLLM requires a NUMA node for each process
    return arguments, environment


def _check_names(names: Sequence[str]) -> None:
    """Raise ConfigError if two models, of which the first is the base of the others, have the same name."""
    for at, name in enumerate(names):
        if name in names[:at]:
            raise ConfigError(
                f"two models would be called {name!r}", expected="different names", fix="choose another NAME in --lora"
            )


def _joint_overrides(adapters: Sequence[Adapter], model: Path, trusted: bool) -> dict[str, Any]:
    """Return the overrides that all adapters need; raise ConfigError if they need different ones."""
    needed = [needed_overrides(adapter, model, trust_remote_code=trusted) for adapter in adapters]
    for adapter, overrides in zip(adapters, needed, strict=True):
        if overrides != needed[0]:
            raise ConfigError(
                f"the adapters '{adapters[0].name}' and '{adapter.name}' change the config of their base in different "
                f"ways: {needed[0]} and {overrides}",
                expected="the same changes, for example the same RoPE scaling",
                fix="serve them separately, or merge them with 'arctic merge'",
            )
    return needed[0]


def _is_headless(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` names a model class without a head, whose outputs are embeddings."""
    named = config.get("architectures")
    return isinstance(named, list) and any(isinstance(name, str) and _HEADLESS.fullmatch(name) for name in named)


def _is_mixture(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` has experts, under a name of ``ModelConfig.get_num_experts`` (vllm 0.32.0)."""
    return any(config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def _check_heads(config: Mapping[str, Any], model: Path) -> None:
    """Raise CheckpointError if vLLM's attention on CPU does not support the head size in ``config`` of ``model``."""
    nested = config.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, dict) else config
    size, hidden, heads = (text.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if size is None and type(hidden) is int and type(heads) is int and heads > 0:
        size = hidden // heads
    if (
        type(size) is int and size not in CPU_HEAD_SIZES and "kv_lora_rank" not in text
    ):  # models with kv_lora_rank have heads of several sizes
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        raise CheckpointError(
            f"{model} has heads of size {size}",
            expected=f"one of {sizes} in vLLM on CPU",
            fix="use 'arctic generate'",
        )


def _shared_cores(size: int) -> str:
    """Split this process's cores into ``size`` parts, in the syntax of ``VLLM_CPU_OMP_THREADS_BIND``.

    If there are fewer cores than parts, they are not split.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    each = len(cores) // size
    return (
        "|".join(",".join(map(str, cores[part * each : (part + 1) * each])) for part in range(size))
        if each
        else "nobind"
    )


def _checked_config(model: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a model that can be served; empty for a Hub id, which is left to vLLM.

    Raises:
        CheckpointError: the directory contains no model, or one that is damaged or has a newer format.
        PluginNotFoundError: a codec's plugin is not installed; the error names the distribution.
    """
    if not (model / "config.json").is_file():
        if not model.exists() and _HUB_ID.fullmatch(str(model)) and ".." not in str(model):
            return {}
        raise CheckpointError(
            f"{model} has no config.json", expected="a checkpoint directory or a Hub id", fix="correct the path"
        )
    check_directory(model)
    config = read_json(model / "config.json")
    check_keys(config, model / "config.json")
    check_sizes(config, sorted(model.glob("*.safetensors")), model / "config.json")
    if method_of(config) == METHOD:
        if (model / FILE_NAME).is_file():
            check_plugins(read_provenance(model))
            check_files(model)
        check_names(ModuleCodecs.from_config(config["quantization_config"]), str(model))
    return config


def _dtype(config: Mapping[str, Any]) -> str | None:
    """Return the compute dtype to set for vLLM, or None if the device multiplies vLLM's own choice natively.

    Its choice is the checkpoint's dtype, or bfloat16 for float32 (``config/model.py`` ``_resolve_auto_dtype``, vllm
    0.32.0).
    """
    import torch

    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    vllms = named if isinstance(named, torch.dtype) and named != torch.float32 else torch.bfloat16
    return None if is_native(vllms) else dtype_name(compute_dtype(vllms))


def _option(options: Sequence[str], name: str) -> str | None:
    """Return the value of ``--name VALUE`` or ``--name=VALUE`` in ``options``; vLLM treats underscores as dashes."""
    for at, option in enumerate(options):
        flag, given, value = option.partition("=")
        if flag.replace("_", "-") == f"--{name}":
            return value if given else next(iter(options[at + 1 :]), None)
    return None


def _given(options: Sequence[str]) -> dict[str, str | bool]:
    """Return ``options`` of a command line by the names of vLLM's fields; those without a value are True."""
    given: dict[str, str | bool] = {}
    name = ""
    for option in options:
        if option.startswith("--"):
            name, has_value, value = option[2:].partition("=")
            name = name.replace("-", "_")
            given[name] = value if has_value else True
        elif name and given[name] is True and not re.match(r"-\D", option):
            given[name] = option
        else:
            name = ""  # a short option, or another value of the same one
    return given


def _runs_on_cpu() -> bool:
    import torch

    return not torch.accelerator.is_available()
