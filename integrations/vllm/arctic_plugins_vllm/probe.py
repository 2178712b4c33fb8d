"""The checks of vLLM that ``arctic doctor`` runs in a separate process."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import CodecError, ConfigError, one_line
from arctic_plugins.plugin import PROJECT, Finding
from arctic_plugins.registry import Registry
from arctic_plugins.resolver import host_version
from arctic_plugins_vllm.host import GROUP

__all__ = ["check_worker"]


def check_worker() -> Iterator[Finding]:
    """Load vLLM's general plugins as its workers do, check that this project is among them, and report who computes."""
    subject = "vllm worker"
    if host_version("vllm") is None or not any(point.name == PROJECT for point in entry_points(group=GROUP)):
        yield Finding("ok", subject, "skipped: vLLM or arctic-plugins-vllm is not installed")
        return
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # vllm/plugins/__init__.py, 0.32.0: ignores exceptions of entry points
    try:
        get_quantization_config("arctic")
    except ValueError as error:
        fix = "see the lines that vLLM logs when it starts; is VLLM_PLUGINS set without arctic_plugins?"
        yield Finding("error", subject, f"the quantization method 'arctic' is not registered: {error}", fix)
        return
    registry = process_registry()
    for name, failure in registry.failures.items():
        yield Finding("error", subject, f"plugin '{name}' is not loaded: {failure}")
    for codec in registry.codec_types():
        try:
            registry.load_codec(codec)
        except Exception as error:  # an import can raise any exception, and all are reported
            yield Finding("error", subject, f"codec '{codec}' cannot be imported: {type(error).__name__}: {error}")
    yield Finding(
        "ok",
        subject,
        f"the method 'arctic' is registered, with the codecs: {', '.join(registry.codec_types()) or 'none'}",
    )
    yield from _kernels(registry)


SMALL_MIXTURE = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
}


def _kernels(registry: Registry) -> Iterator[Finding]:
    """Report which codecs vLLM's own kernels compute here (:mod:`arctic_plugins_vllm.native`).

    vLLM builds a small mixture without weights, one layer for each codec.
    """
    from arctic_plugins.frozen import ModuleCodecs
    from arctic_plugins_vllm.native import VARIABLE, may_be_wanted
    from arctic_plugins_vllm.sharding import built_as_rank

    subject, chosen = "vllm kernels", dict[str, list[str]]()
    setting = f"{VARIABLE}={os.environ.get(VARIABLE) or 'unset'}"
    try:
        if not may_be_wanted():  # building layers takes seconds
            yield Finding("ok", subject, f"all encoded weights are computed by their codecs ({setting})")
            return
    except ConfigError as error:
        yield Finding("error", subject, str(error))
        return
    codecs = [codec for name in registry.codec_types() for codec in _variants(registry.load_codec(name))]
    ids = {str(at): codec for at, codec in enumerate(codecs)}
    modules = {f"model.layers.{at}.self_attn.*": at for at in ids}
    modules |= {f"model.layers.{at}.block_sparse_moe.experts.*.*": at for at in ids}
    config = SMALL_MIXTURE | {"num_hidden_layers": len(ids)}
    config["quantization_config"] = ModuleCodecs(ids, modules).to_config()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            with built_as_rank(directory, 0, 1) as (model, _):
                methods: list[Any] = [getattr(module, "quant_method", None) for module in model.modules()]
        except Exception as error:  # what a device or its driver raises can be anything
            yield Finding("warning", subject, f"vLLM cannot build a layer here: {one_line(error)}")
            return
    for method in methods:
        if (native := getattr(method, "native", None)) is not None:
            weights = chosen.setdefault(native.kernel, [])
            weights += [method.weights] if method.weights not in weights else []
    lines = [f"vLLM's {kernel} computes {'; '.join(weights)}" for kernel, weights in chosen.items()]
    lines.append(f"{'all other' if lines else 'all'} encoded weights are computed by their codecs")
    yield Finding("ok", subject, f"{'; '.join(lines)} ({setting})")


def _variants(codec_class: Any) -> Iterator[Any]:
    """Yield a codec with its defaults, and with each other value of a field whose type is a ``Literal``."""
    choices = {
        name: get_args(hint) for name, hint in get_type_hints(codec_class).items() if get_origin(hint) is Literal
    }
    found = []
    for changes in ({}, *({name: value} for name, values in choices.items() for value in values)):
        try:
            codec = codec_class(**changes)
        except (CodecError, TypeError):  # not a possible combination, or a field without a default
            continue
        if codec not in found:
            found.append(codec)
    yield from found
