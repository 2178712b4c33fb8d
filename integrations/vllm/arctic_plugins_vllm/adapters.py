"""LoRA adapters over one base model: what vLLM needs for them, and whether they belong on it."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from arctic_plugins.adapter import ADAPTER, WEIGHTS, adapted_modules, read_adapter
from arctic_plugins.discovery import load_plugin, process_registry
from arctic_plugins.errors import CheckpointError, CodecError, ConfigError
from arctic_plugins.files import check_directory, tensor_shapes
from arctic_plugins.frozen import METHOD, ModuleCodecs
from arctic_plugins.provenance import FILE_NAME, check_files
from arctic_plugins.recorded import stack_from_checkpoint
from arctic_plugins.stack import Stack

__all__ = ["Adapter", "Base", "check_adapter", "engine_arguments", "open_adapter", "parse_adapters"]

logger = logging.getLogger(__name__)

MOST_LORAS = 8
"""The largest ``max_loras`` that is set: each takes the memory of one adapter of the largest rank on the device."""
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """An adapter that has been checked on its own: vLLM supports it, and its files are those that were saved."""

    name: str
    """The name of the model in requests."""
    path: Path
    """Its directory, absolute."""
    stack: Stack
    """What it was trained with; if that is no plugin for adapters, with the installed ones, which serve it."""
    is_recorded: bool
    """Whether the stack is recorded in the adapter."""
    arguments: Mapping[str, Any]
    """The engine arguments that it needs, by the names of ``EngineArgs``."""

    @property
    def base(self) -> str:
        """The base model that its config names: a directory or Hub id."""
        return str(self.arguments["model"])

    @property
    def changes(self) -> Stack:
        """The plugins that change the config of a model, and of any base model under this adapter."""
        return self.stack.to_use().of_model().without("weight_codec", "placement", "adapter")


@dataclass(frozen=True)
class Base:
    """The model that adapters are served over."""

    model: str
    """Directory or Hub id."""
    config: Mapping[str, Any]
    """Its ``config.json``; empty if the model is not a local directory."""
    encoding: Mapping[str, Any] | None = None
    """The plugins that encoded its weights, with their options, by name; empty if the weights are plain, None if that
    is unknown.
    """


def parse_adapters(given: Iterable[str]) -> dict[str, str]:
    """Return name -> directory of ``NAME=PATH`` arguments.

    Raises:
        ConfigError: an argument has another form, or a name is given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, separator, path = text.partition("=")
        if not (name and separator and path):
            raise ConfigError(f"--lora is {text!r}", expected="NAME=PATH", fix="for example --lora sql=out/final")
        if name in found:
            raise ConfigError(f"--lora names two adapters {name!r}", expected="different names", fix="rename one")
        found[name] = path
    return found


def open_adapter(path: str | Path, name: str | None = None) -> Adapter:
    """Read and check an adapter in PEFT's format: one that this project saved, or any other.

    Args:
        path: directory.
        name: in requests; by default that of the directory.

    Raises:
        CheckpointError: the directory contains no adapter, a file is damaged, or vLLM does not support the adapter.
        PluginNotFoundError: a plugin that made it is not installed.
        ConfigError: no installed plugin serves adapters.
    """
    path = Path(os.path.abspath(path))  # so that "." gets a name
    name = path.name if name is None else name
    if not (path / ADAPTER).is_file():
        raise CheckpointError(
            f"{path} has no {ADAPTER}", expected="the directory of an adapter in PEFT's format", fix="correct the path"
        )
    check_directory(path)
    is_recorded = (path / FILE_NAME).is_file()
    stack = stack_from_checkpoint(path) if is_recorded else Stack()
    if not len(stack.only("adapter")):  # PEFT made the adapter, without a plugin
        stack = stack.plus(_serving_plugins())
    if is_recorded:
        check_files(path)
    _check_readable(path)
    arguments = stack.vllm_engine_args(path)
    if "lora_modules" not in arguments:
        raise ConfigError(
            f"{path} is an adapter, and no installed plugin serves adapters",
            expected="one that fills the slot 'adapter'",
            fix="install it, or use vLLM's --lora-modules",
        )
    return Adapter(name, path, stack, is_recorded, arguments)


def _check_readable(path: Path) -> None:
    """Raise CheckpointError if the adapter in ``path`` has no weights in safetensors' format: vLLM takes a pickle."""
    again = "the adapter is incomplete; copy it again, or save it again"
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{path} has no {WEIGHTS}", fix=again)
    try:
        adapted_modules(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / WEIGHTS} cannot be read: {error}", fix=again) from error


def _serving_plugins() -> Stack:
    """Return the installed plugins that fill the slot ``adapter``, with their defaults."""
    found = []
    for name in process_registry().plugins:
        plugin = load_plugin(name)
        if "adapter" in plugin.slots:
            try:
                found.append(plugin.from_options({}))
            except ConfigError:  # has an option without a default, which nobody has set
                continue
    return Stack(tuple(found))


def check_adapter(adapter: Adapter, base: Base) -> None:
    """Check that ``adapter`` belongs on ``base``: the same encoding, and the shapes of the same modules.

    The weights themselves are not compared: two models of the same architecture look alike.

    Raises:
        ConfigError: the message contains the command that mends it.
    """
    wanted, found = adapter.stack.only("weight_codec"), base.encoding
    if found is not None and any(found.get(name) != options for name, options in wanted.to_dict().items()):
        raise ConfigError(
            f"{adapter.path} was trained over weights encoded with {wanted.to_dict()}, but {base.model} was made with "
            f"{dict(found)}"
            if found
            else f"{adapter.path} was trained over encoded weights, but its base {base.model} is plain",
            fix=f"{_mended(adapter, base, wanted)}, or arctic merge {adapter.path} OUT",
        )
    if adapter.is_recorded and not len(wanted) and base.encoding:
        logger.warning(
            "adapter '%s' was trained over plain weights, and %s is encoded: its answers differ slightly from those of "
            "training",
            adapter.name,
            base.model,
        )
    if (misfit := _misfit(adapter, base)) is not None:
        module, wants, has = misfit
        raise ConfigError(
            f"{adapter.path} adapts {module} of shape {wants}, but {base.model} has {has}",
            expected=f"the base model of its training, which it calls {adapter.base}",
            fix=_serving(adapter.base, adapter),
        )


def _serving(model: str, adapter: Adapter) -> str:
    """Return the command that serves ``adapter`` over ``model``."""
    return f"arctic serve {shlex.quote(model)} --lora {shlex.quote(f'{adapter.name}={adapter.path}')}"


def _mended(adapter: Adapter, base: Base, wanted: Stack) -> str:
    """Return the commands that serve ``adapter`` over a base encoded as ``wanted``: the recorded one, or a new one."""
    own = Path(adapter.base)
    if (own / FILE_NAME).is_file() and own.resolve() != Path(base.model).resolve():
        return _serving(adapter.base, adapter)
    plain = adapter.base if base.encoding else base.model
    return f"arctic quantize {shlex.quote(plain)} BASE --plugins {_spelled(wanted)} && {_serving('BASE', adapter)}"


def _spelled(stack: Stack) -> str:
    """Return ``stack`` as an argument of ``--plugins``: names, or JSON if an option differs from its default."""
    options = {
        plugin.name: plugin.options.model_dump(mode="json", exclude_defaults=True)
        for plugin in sorted(stack, key=lambda plugin: plugin.name)
    }
    return shlex.quote(json.dumps(options)) if any(options.values()) else ",".join(options)


def _misfit(adapter: Adapter, base: Base) -> tuple[str, tuple[int, ...], str] | None:
    """Return the first module of ``adapter`` that ``base`` has with another shape, or lacks although layers repeat it.

    Returns:
        The module, the shape ``(N, K)`` that the adapter needs, and what the base has; None if everything fits, or
        nothing can be compared, because the base is not a local directory or stores its weights under other names.
    """
    files = sorted(Path(base.model).glob("*.safetensors"))
    shapes = _shapes(files)
    codecs = None
    quantization = base.config.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD:
        codecs = ModuleCodecs.from_config(quantization)
    modules = {name.rpartition(".")[0] for name in shapes}
    repeated = {re.sub(r"\.\d+(?=\.)", ".*", name) for name in modules}
    for module, (rows, columns) in sorted(_matrices(adapter.path).items()):
        shape = (rows, columns)
        if module not in modules:
            if re.sub(r"\.\d+(?=\.)", ".*", module) in repeated:
                return module, shape, "no such module"
            continue
        codec = None if codecs is None else codecs.codec_of(module)
        if codec is None:
            if shapes.get(f"{module}.weight", shape) not in (shape, shape[::-1]):  # GPT-2's Conv1D holds [K, N]
                return module, shape, str(shapes[f"{module}.weight"])
            continue
        try:
            layout = {suffix: tuple(spec.shape) for suffix, spec in codec.layout(shape).items()}
        except CodecError as error:
            return module, shape, f"encoded weights: {error.found}"
        for suffix, needed in layout.items():
            stored = f"{module}.weight{suffix}"
            if shapes.get(stored, needed) != needed:
                return module, shape, f"one whose {stored.rpartition('.')[2]} is {shapes[stored]} instead of {needed}"
    return None


def _shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors in safetensors files, of which only the headers are read."""
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            found |= tensor_shapes(path)
        except (OSError, SafetensorError):  # the code that reads the weights reports what is wrong
            return {}
    return found


def _matrices(adapter: Path) -> dict[str, tuple[int, int]]:
    """Return module -> ``(N, K)`` of the weights that an adapter's pairs of matrices are added to."""
    rows, columns = dict[str, int](), dict[str, int]()
    for name, shape in _shapes([adapter / WEIGHTS]).items():
        if (match := _MATRIX.fullmatch(name)) and len(shape) == 2:
            if match[2] == "A":
                columns[match[1]] = shape[1]
            else:
                rows[match[1]] = shape[0]
    return {module: (rows[module], columns[module]) for module in rows.keys() & columns.keys()}


def engine_arguments(adapters: Sequence[Adapter], *, is_mixture: bool) -> dict[str, Any]:
    """Return the engine arguments that serve all of ``adapters``, without ``model``.

    Raises:
        ConfigError: two adapters need different values of an argument.
    """
    if not adapters:
        return {}
    merged: dict[str, Any] = {}
    owner: dict[str, Adapter] = {}
    for adapter in adapters:
        for key, value in adapter.arguments.items():
            if key in ("model", "lora_modules", "max_lora_rank", "tokenizer"):
                continue
            if merged.setdefault(key, value) != value:
                raise ConfigError(
                    f"adapters '{owner[key].name}' and '{adapter.name}' set the engine argument '{key}' to "
                    f"{merged[key]!r} and {value!r}",
                    fix=f"pass --{key.replace('_', '-')} yourself, or serve them separately",
                )
            owner[key] = adapter
    merged["max_lora_rank"] = max(adapter.arguments["max_lora_rank"] for adapter in adapters)
    merged["lora_modules"] = [{"name": adapter.name, "path": str(adapter.path)} for adapter in adapters]
    if len(adapters) > 1:  # vLLM's default, 1, puts requests of different adapters in different steps
        merged["max_loras"] = min(len(adapters), MOST_LORAS)
    merged |= _tokenizer(adapters)
    if is_mixture:  # otherwise vLLM also prepares experts for adapters, which takes memory, and on CPU needs Triton
        named = [_targets(adapter.path) for adapter in adapters]
        if all(named):
            merged["lora_target_modules"] = sorted(set[str]().union(*named))
    return merged


def _targets(adapter: Path) -> set[str]:
    return set(read_adapter(adapter).target_modules or ()) or {
        name.rpartition(".")[2] for name in adapted_modules(adapter)
    }


def _tokenizer(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Return the tokenizer of the adapters, of which vLLM has one for all models, if they agree on it.

    Training may have given it a chat template, and another end of an answer. If they differ, it is the base model's.
    """
    named = [adapter.arguments.get("tokenizer") for adapter in adapters]
    contents = {
        None if directory is None else tuple(_contents(Path(directory) / file) for file in _TOKENIZER_FILES)
        for directory in named
    }
    if len(contents) == 1:
        return {} if named[0] is None else {"tokenizer": named[0]}
    logger.warning(
        "the adapters %s have different tokenizers or chat templates: that of the base model is used for all (set "
        "--tokenizer or --chat-template to use another)",
        ", ".join(adapter.name for adapter in adapters),
    )
    return {}


_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")


def _contents(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
