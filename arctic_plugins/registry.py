"""What installed plugins add to a process, by name and looked up lazily: codec types, formats to export to and convert
from, models, engines that make a Trainer's steps.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from arctic_plugins.errors import PluginError, PluginNotFoundError, suggest
from arctic_plugins.plugin import PluginConfig

__all__ = ["FIRST_PARTY", "ROPE_MARK", "Importer", "ModelClasses", "Registry", "load"]

FIRST_PARTY = frozenset({"deepspeed", "fp8", "longseq", "lora", "moe", "offload", "rope", "shard"})
"""Plugins whose distribution is ``arctic-plugins-NAME``. Of others, only a file may have said where they come from."""

ROPE_MARK = "arctic_rope"
"""Key of a ``config.json`` whose RoPE scaling a plugin has written: hosts leave that of other models as they have
it.
"""


@dataclass(frozen=True)
class ModelClasses:
    """A model architecture that hosts do not have. All are lazy ``"module:attribute"`` strings."""

    config: str
    """A ``PreTrainedConfig``, for both hosts."""
    base: str
    """In transformers: the decoder, for ``AutoModel``. Its static method ``checkpoint_conversions`` gives what
    transformers' ``register_checkpoint_conversion_mapping`` takes, where checkpoints name or cut weights otherwise."""
    causal_lm: str
    """In transformers, for ``AutoModelForCausalLM``."""
    vllm: str
    """In vLLM."""
    tokenizer: str | None = None
    """For checkpoints whose ``tokenizer_config.json`` names no class that transformers knows."""


@dataclass(frozen=True)
class Importer:
    """A reader of another library's checkpoints, with options of its own; see :meth:`Registry.importer`."""

    target: str
    options: type[PluginConfig]

    def __str__(self) -> str:
        return self.target

    @property
    def meaning(self) -> str:
        """What the format is and what becomes of it: the first paragraph of the options' docstring."""
        return " ".join((self.options.__doc__ or "").partition("\n\n")[0].replace("``", "").split())


@dataclass
class Registry:
    """Filled once per process from the ``register`` hooks; see :func:`arctic_plugins.discovery.process_registry`."""

    failures: dict[str, Exception] = field(default_factory=dict)
    """Installed plugins that could not be loaded -> why. Raised only when something that is missing is asked for."""
    plugins: list[str] = field(default_factory=list)
    """Installed plugins that were loaded."""
    _codecs: dict[str, str] = field(default_factory=lambda: {"plain": "arctic_plugins.frozen.plain:PlainCodec"})
    _exporters: dict[str, str] = field(default_factory=dict)
    _converters: dict[str, str] = field(default_factory=dict)
    _experts_functions: dict[str, str] = field(default_factory=dict)
    _rope_types: dict[str, str] = field(default_factory=dict)
    _widening: dict[str, str] = field(default_factory=dict)
    _trainer_engines: dict[str, str] = field(default_factory=dict)
    _host_launchers: dict[str, str] = field(default_factory=dict)
    _environments: list[str] = field(default_factory=list)
    importers: dict[str, Importer] = field(default_factory=dict)
    """Format of ``arctic convert`` -> who reads it; see :meth:`importer`."""
    models: dict[str, ModelClasses] = field(default_factory=dict)
    """``model_type`` -> its classes."""

    def model(self, model_type: str, classes: ModelClasses) -> None:
        """Add a model architecture; hosts that know ``model_type`` themselves keep theirs.

        Raises:
            PluginError: the type is taken by other classes; the message names both.
        """
        taken = self.models.setdefault(model_type, classes)
        if taken != classes:
            raise PluginError(
                f"model type '{model_type}' is registered by {taken.config} and by {classes.config}",
                fix="uninstall one of the two",
            )

    def experts_function(self, name: str, target: str) -> None:
        """Add an ``experts_implementation`` of transformers: ``target`` is ``"module:attribute"`` of a function like
        those in ``transformers/integrations/moe.py``, ``(experts, hidden_states, top_k_index, top_k_weights) ->
        hidden_states``.

        Raises:
            PluginError: the name is taken by another target; the message names both.
        """
        _add("experts function", self._experts_functions, name, target)

    def rope_type(self, name: str, target: str) -> None:
        """Add a way of scaling rotary position embeddings, for both hosts; one that has ``name`` itself keeps its own.

        Args:
            name: the ``rope_type`` that stands in a config's ``rope_parameters``.
            target: ``"module:attribute"`` of a function ``(rope_parameters, dim) -> (inverse frequencies [dim / 2] in
                float32, a factor for cosines and sines)``. It gets what stands in the config, ``rope_theta`` and
                ``factor`` among it, and how many dimensions of a head are rotated. ``max_position_embeddings`` of such
                a config is the trained length, of which ``factor`` times as much can be served.

        Raises:
            PluginError: the name is taken by another target; the message names both.
        """
        _add("RoPE type", self._rope_types, name, target)

    def codec(self, type_name: str, target: str) -> None:
        """Add a codec type.

        Args:
            type_name: the ``type`` that stands in a checkpoint's ``quantization_config.codecs``.
            target: ``"module:attribute"`` of a :class:`~arctic_plugins.frozen.codec.Codec` class.

        Raises:
            PluginError: the name is taken by another target; the message names both.
        """
        _add("codec type", self._codecs, type_name, target)

    def widening_linear(self, target: str) -> None:
        """Add the function with which plain weights in bfloat16 are multiplied where products are in float32, on CPU.

        Args:
            target: ``"module:attribute"`` of a function without arguments. It gives None where it has nothing faster
                than widening the whole weight, otherwise a function ``(x float32 [..., K], weight bfloat16 [N, K]) ->
                float32 [..., N]``: differentiable, a torch operator.

        Raises:
            PluginError: another target is registered; the message names both.
        """
        _add("product", self._widening, "linear of a bfloat16 weight in float32", target)

    def load_widening_linear(self) -> Any:
        """Import what :meth:`widening_linear` was given, and return the product that it gives; None if there is
        none.
        """
        return next((load(target)() for target in self._widening.values()), None)

    def exporter(self, format_name: str, target: str) -> None:
        """Add a format of ``arctic export``: ``target`` is ``"module:attribute"`` of a
        :class:`~arctic_plugins.frozen.exporting.Exporter` class.

        Raises:
            PluginError: the name is taken by another target; the message names both.
        """
        _add("export format", self._exporters, format_name, target)

    def converter(self, format_name: str, target: str) -> None:
        """Add a format of ``arctic convert``: ``target`` is ``"module:attribute"`` of a
        :class:`~arctic_plugins.frozen.exporting.Converter` class.

        Raises:
            PluginError: the name is taken by another target; the message names both.
        """
        _add("convertible format", {**self.importers, **self._converters}, format_name, target)
        self._converters[format_name] = target

    def importer(self, format_name: str, target: str, options: type[PluginConfig] = PluginConfig) -> None:
        """Add a format of ``arctic convert`` that is more than a way to quantize: the name of every tensor may be
        another, and so may the files.

        Args:
            format_name: what stands behind ``--from``.
            target: ``"module:attribute"`` of a function ``(checkpoint, directory, options) -> lines``. It writes what
                it reads in ``checkpoint`` to the new ``directory``, and returns what it found, a line each, to be
                printed.
            options: what the format asks for; an instance of it is given to the function. Its fields become options
                of ``arctic convert``: the text under a field is their help, and the first paragraph of the class's
                docstring says what the format is and what is written. Define it in a module that imports nothing
                heavy.

        Raises:
            PluginError: the name is taken by another importer, or by a converter; the message names both.
        """
        added = Importer(target, options)
        _add("convertible format", {**self._converters, **self.importers}, format_name, added)
        self.importers[format_name] = added

    def trainer_engine(self, name: str, target: str) -> None:
        """Add what a Hugging Face Trainer needs where another library makes its steps.

        Args:
            name: of the library, as it stands in ``TrainingArguments``: ``deepspeed``.
            target: ``"module:attribute"`` of a ``TrainerEngine`` class
                (:mod:`arctic_plugins_huggingface.training.engines`).

        Raises:
            PluginError: the name is taken by another target; the message names both.
        """
        _add("engine of a Trainer's steps", self._trainer_engines, name, target)

    def host_launcher(self, target: str) -> None:
        """Add what starts the processes of ``arctic train --hostfile``, on several hosts.

        Args:
            target: ``"module:attribute"`` of a function ``(arguments, hostfile, environment) -> exit status``. It runs
                ``python -m arctic_plugins.cli`` with ``arguments`` on each host of ``hostfile`` (lines of ``host
                slots=8``), starts whatever it starts here with ``environment``, and waits.

        Raises:
            PluginError: another target is registered; the message names both.
        """
        _add("launcher for", self._host_launchers, "--hostfile", target)

    def environment(self, target: str) -> None:
        """Add environment variables that processes of ``arctic`` have before hosts are imported. What the user has set
        stays.

        Args:
            target: ``"module:attribute"`` of a function without arguments that gives name -> value. It may import
                torch, and nothing that reads the variables.
        """
        if target not in self._environments:
            self._environments.append(target)

    def codec_types(self) -> list[str]:
        return sorted(self._codecs)

    def load_codec(self, type_name: str) -> Any:
        """Import and return the codec class registered as ``type_name``.

        Raises:
            PluginNotFoundError: nobody registered it; says which plugin would, or which installed plugin failed to
                load.
        """
        if type_name not in self._codecs:
            broken = "; ".join(str(error) for error in self.failures.values())
            ours = _install(type_name) or "install the plugin that provides it, if you trust it"
            raise PluginNotFoundError(
                f"the checkpoint's codec type '{type_name}' is provided by no installed plugin",
                fix=broken or f"{ours}; {suggest(type_name, self._codecs)}",
            )
        return load(self._codecs[type_name])

    def converter_names(self) -> list[str]:
        return sorted(self._converters)

    def check_convertible(self, format_name: str) -> None:
        """Raise PluginNotFoundError if no installed plugin has a converter or an importer called ``format_name``."""
        known = {*self._converters, *self.importers}
        if format_name not in known:
            raise PluginNotFoundError(
                f"no installed plugin converts from '{format_name}'", fix=self._source(format_name, known)
            )

    def trainer_engines(self) -> list[str]:
        return sorted(self._trainer_engines)

    def check_trainer_engine(self, name: str) -> None:
        """Raise PluginNotFoundError if no installed plugin has an engine called ``name``."""
        if name not in self._trainer_engines:
            raise PluginNotFoundError(
                f"no installed plugin prepares a Trainer for '{name}'", fix=self._source(name, self._trainer_engines)
            )

    def load_trainer_engine(self, name: str) -> Any:
        """Import and return the class registered as ``name``; raises PluginNotFoundError when nobody registered it."""
        self.check_trainer_engine(name)
        return load(self._trainer_engines[name])

    def load_host_launcher(self) -> Any:
        """Import and return the function that starts processes on several hosts; raises PluginNotFoundError when
        there is none.
        """
        if not self._host_launchers:
            raise PluginNotFoundError(
                "no installed plugin starts the processes of --hostfile",
                fix=f"{self._source('deepspeed', ())}, or use --nproc or torchrun",
            )
        return load(*self._host_launchers.values())

    def load_environment(self) -> dict[str, str]:
        """Call what :meth:`environment` was given, and return the variables.

        Raises:
            PluginError: two plugins want different values of one; the message names both.
        """
        found: dict[str, str] = {}
        owners: dict[str, str] = {}
        for target in self._environments:
            for name, value in load(target)().items():
                if found.setdefault(name, value) != value:
                    raise PluginError(
                        f"{owners[name]} sets {name} to '{found[name]}' and {target} to '{value}'",
                        fix=f"set {name} yourself, or uninstall one of the two",
                    )
                owners.setdefault(name, target)
        return found

    def experts_functions(self) -> dict[str, Any]:
        """Name -> function, imported."""
        return {name: load(target) for name, target in self._experts_functions.items()}

    def rope_types(self) -> list[str]:
        return sorted(self._rope_types)

    def load_rope_type(self, name: str) -> Any:
        """Import and return the function registered as ``name``; raises PluginNotFoundError when nobody registered
        it.
        """
        return _load_format(self._rope_types, name, "scales rotary position embeddings by")

    def load_exporter(self, format_name: str) -> Any:
        """Import and return the exporter class registered as ``format_name``; raises PluginNotFoundError when nobody
        registered it.
        """
        return _load_format(self._exporters, format_name, "exports to")

    def load_converter(self, format_name: str) -> Any:
        """Import and return the converter class registered as ``format_name``; raises PluginNotFoundError when nobody
        registered it.
        """
        return _load_format(self._converters, format_name, "converts from")

    def _source(self, name: str, known: Iterable[str]) -> str:
        """How to come by what the plugin called ``name`` registers under its own name."""
        if name in self.failures:
            return str(self.failures[name])
        return (name not in self.plugins and _install(name)) or suggest(name, known)


def _install(name: str) -> str:
    return f"pip install arctic-plugins-{name}" if name in FIRST_PARTY else ""


def _add(kind: str, table: dict[str, Any], name: str, target: str | Importer) -> None:
    taken = table.setdefault(name, target)
    if taken != target:
        raise PluginError(f"{kind} '{name}' is registered by {taken} and by {target}", fix="uninstall one of the two")


def _load_format(table: dict[str, str], name: str, does: str) -> Any:
    if name not in table:
        raise PluginNotFoundError(f"no installed plugin {does} '{name}'", fix=suggest(name, table))
    return load(table[name])


def load(target: str) -> Any:
    """Import and return ``"module:attribute"``."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
