"""What installed plugins add to a process, by name and imported lazily.

These are codec types, formats to export to and convert from, models, engines that run a Trainer's steps, and more.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from arctic_plugins.errors import PluginError, PluginNotFoundError, suggest
from arctic_plugins.plugin import PluginConfig
from arctic_plugins.prose import first_paragraph

__all__ = ["FIRST_PARTY", "ROPE_MARK", "Importer", "ModelClasses", "Registry", "load"]

FIRST_PARTY = frozenset({"bnb", "deepspeed", "fp8", "longseq", "lora", "moe", "offload", "rope", "shard", "speculate"})
"""Plugins whose distribution is ``arctic-plugins-NAME``. That of any other may be known only from an untrusted file."""

ROPE_MARK = "arctic_rope"
"""Key that marks a ``config.json`` whose RoPE scaling a plugin has written. Hosts treat all other models as they do
without this project.
"""


@dataclass(frozen=True)
class ModelClasses:
    """A model architecture that the hosts lack. All fields are lazy ``"module:attribute"`` strings."""

    config: str
    """A ``PreTrainedConfig``, for both hosts."""
    base: str
    """In transformers: the decoder, for ``AutoModel``. If checkpoints name or split weights differently, its static
    method ``checkpoint_conversions`` returns what transformers' ``register_checkpoint_conversion_mapping`` takes."""
    causal_lm: str
    """In transformers: the class for ``AutoModelForCausalLM``."""
    vllm: str
    """In vLLM: the class of the model."""
    tokenizer: str | None = None
    """For checkpoints whose ``tokenizer_config.json`` names no class that transformers knows."""
    heads: Mapping[str, str] = field(default_factory=dict)
    """In transformers: classes for other tasks, by the name of the class that finds them, for example
    ``AutoModelForSequenceClassification``. vLLM derives its own from :attr:`vllm`."""


@dataclass(frozen=True)
class Importer:
    """A reader of another library's checkpoints, with its own options; see :meth:`Registry.importer`."""

    target: str
    options: type[PluginConfig]

    def __str__(self) -> str:
        return self.target

    @property
    def meaning(self) -> str:
        """The format and what it is converted to: the first paragraph of the options' docstring."""
        return first_paragraph(self.options.__doc__)


@dataclass
class Registry:
    """What installed plugins have registered.

    It is filled once per process, by the ``register`` hooks; see :func:`arctic_plugins.discovery.process_registry`.
    """

    failures: dict[str, Exception] = field(default_factory=dict)
    """Installed plugins that could not be loaded -> the error, raised only when something missing is requested.

    .. versionadded:: 0.1
    """
    plugins: list[str] = field(default_factory=list)
    """Installed plugins that were loaded.

    .. versionadded:: 0.1
    """
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
    """Format of ``arctic convert`` -> its reader; see :meth:`importer`.

    .. versionadded:: 0.1
    """
    models: dict[str, ModelClasses] = field(default_factory=dict)
    """``model_type`` -> its classes.

    .. versionadded:: 0.1
    """

    def model(self, model_type: str, classes: ModelClasses) -> None:
        """Add a model architecture. A host that knows ``model_type`` itself keeps its own.

        Raises:
            PluginError: other classes are registered for the type; the message names both.

        .. versionadded:: 0.1
        """
        taken = self.models.setdefault(model_type, classes)
        if taken != classes:
            raise PluginError(
                f"model type '{model_type}' is registered by {taken.config} and by {classes.config}",
                fix="uninstall one of the two",
            )

    def experts_function(self, name: str, target: str) -> None:
        """Add an ``experts_implementation`` to transformers.

        Args:
            name: of the implementation.
            target: ``"module:attribute"`` of a function like those in ``transformers/integrations/moe.py``, ``(experts,
                hidden_states, top_k_index, top_k_weights) -> hidden_states``.

        Raises:
            PluginError: another target is registered under the name; the message names both.

        .. versionadded:: 0.1
        """
        _add("experts function", self._experts_functions, name, target)

    def rope_type(self, name: str, target: str) -> None:
        """Add a RoPE scaling type for both hosts. A host that knows ``name`` itself keeps its own.

        Args:
            name: the ``rope_type`` in the ``rope_parameters`` of a config.
            target: ``"module:attribute"`` of a function ``(rope_parameters, dim) -> (inverse frequencies [dim / 2] in
                float32, a factor for cosines and sines)``. It receives the parameters in the config, including
                ``rope_theta`` and ``factor``, and the number of dimensions of a head that are rotated. In such a
                config, ``max_position_embeddings`` is the trained length; ``factor`` times as much can be served.

        Raises:
            PluginError: another target is registered under the name; the message names both.

        .. versionadded:: 0.1
        """
        _add("RoPE type", self._rope_types, name, target)

    def codec(self, type_name: str, target: str) -> None:
        """Add a codec type.

        Args:
            type_name: the ``type`` in a checkpoint's ``quantization_config.codecs``.
            target: ``"module:attribute"`` of a :class:`~arctic_plugins.frozen.codec.Codec` class.

        Raises:
            PluginError: another target is registered under the name; the message names both.

        .. versionadded:: 0.1
        """
        _add("codec type", self._codecs, type_name, target)

    def widening_linear(self, target: str) -> None:
        """Add the function that multiplies plain bfloat16 weights on CPU when products are computed in float32.

        Args:
            target: ``"module:attribute"`` of a function without arguments. It returns None if it has nothing faster
                than widening the whole weight, otherwise a function ``(x float32 [..., K], weight bfloat16 [N, K]) ->
                float32 [..., N]``, which is differentiable and a torch operator.

        Raises:
            PluginError: another target is registered; the message names both.

        .. versionadded:: 0.1
        """
        _add("product", self._widening, "linear of a bfloat16 weight in float32", target)

    def load_widening_linear(self) -> Any:
        """Import the target of :meth:`widening_linear` and return the function that it gives, or None.

        .. versionadded:: 0.1
        """
        return next((load(target)() for target in self._widening.values()), None)

    def exporter(self, format_name: str, target: str) -> None:
        """Add a format to ``arctic export``.

        Args:
            format_name: of the format.
            target: ``"module:attribute"`` of an :class:`~arctic_plugins.frozen.exporting.Exporter` class.

        Raises:
            PluginError: another target is registered under the name; the message names both.

        .. versionadded:: 0.1
        """
        _add("export format", self._exporters, format_name, target)

    def converter(self, format_name: str, target: str) -> None:
        """Add a format to ``arctic convert``.

        Args:
            format_name: of the format.
            target: ``"module:attribute"`` of a :class:`~arctic_plugins.frozen.exporting.Converter` class.

        Raises:
            PluginError: another target is registered under the name; the message names both.

        .. versionadded:: 0.1
        """
        _add("convertible format", {**self.importers, **self._converters}, format_name, target)
        self._converters[format_name] = target

    def importer(self, format_name: str, target: str, options: type[PluginConfig] = PluginConfig) -> None:
        """Add a format to ``arctic convert`` that differs in more than the quantization, such as tensor names or files.

        Args:
            format_name: the value of ``--from``.
            target: ``"module:attribute"`` of a function ``(checkpoint, directory, options) -> lines``. It reads
                ``checkpoint``, writes the result to the new ``directory``, and returns what it found, one line each, to
                be printed.
            options: the options of the format; the function receives an instance. Its fields become options of ``arctic
                convert``, and the text under a field is the option's help. The first paragraph of the class's docstring
                describes the format and what is written. Define the class in a module that imports nothing heavy.

        Raises:
            PluginError: another importer or converter is registered under the name; the message names both.

        .. versionadded:: 0.1
        """
        added = Importer(target, options)
        _add("convertible format", {**self._converters, **self.importers}, format_name, added)
        self.importers[format_name] = added

    def trainer_engine(self, name: str, target: str) -> None:
        """Add what a Hugging Face Trainer needs if another library runs its steps.

        Args:
            name: the library's name in ``TrainingArguments``, for example ``deepspeed``.
            target: ``"module:attribute"`` of a ``TrainerEngine`` class
                (:mod:`arctic_plugins_huggingface.training.engines`).

        Raises:
            PluginError: another target is registered under the name; the message names both.

        .. versionadded:: 0.1
        """
        _add("trainer engine", self._trainer_engines, name, target)

    def host_launcher(self, target: str) -> None:
        """Add what starts the processes of ``arctic train --hostfile`` on several hosts.

        Args:
            target: ``"module:attribute"`` of a function ``(arguments, hostfile, environment) -> exit status``. It runs
                ``python -m arctic_plugins.cli`` with ``arguments`` on each host in ``hostfile`` (lines such as ``host
                slots=8``), starts its local processes with ``environment``, and waits.

        Raises:
            PluginError: another target is registered; the message names both.

        .. versionadded:: 0.1
        """
        _add("launcher for", self._host_launchers, "--hostfile", target)

    def environment(self, target: str) -> None:
        """Add environment variables for processes of ``arctic``, set before hosts are imported.

        Variables that the user has set keep their values.

        Args:
            target: ``"module:attribute"`` of a function without arguments that returns name -> value. It may import
                torch, but nothing that reads the variables.

        .. versionadded:: 0.1
        """
        if target not in self._environments:
            self._environments.append(target)

    def codec_types(self) -> list[str]:
        """Return the registered codec types, sorted.

        .. versionadded:: 0.1
        """
        return sorted(self._codecs)

    def load_codec(self, type_name: str) -> Any:
        """Import and return the codec class registered as ``type_name``.

        Raises:
            PluginNotFoundError: no plugin registered it; the message names the plugin that would, or the installed
                plugin that could not be loaded.

        .. versionadded:: 0.1
        """
        if type_name not in self._codecs:
            broken = "; ".join(str(error) for error in self.failures.values())
            ours = _install(type_name.partition("-")[0]) or "install the plugin that provides it, if you trust it"
            raise PluginNotFoundError(
                f"no installed plugin provides the checkpoint's codec type '{type_name}'",
                fix=broken or f"{ours}; {suggest(type_name, self._codecs)}",
            )
        return load(self._codecs[type_name])

    def converter_names(self) -> list[str]:
        """Return the formats that have a converter, sorted.

        .. versionadded:: 0.1
        """
        return sorted(self._converters)

    def exporter_names(self) -> list[str]:
        """Return the formats that have an exporter, sorted.

        .. versionadded:: 0.1
        """
        return sorted(self._exporters)

    def check_convertible(self, format_name: str) -> None:
        """Raise PluginNotFoundError if no installed plugin has a converter or an importer called ``format_name``.

        .. versionadded:: 0.1
        """
        known = {*self._converters, *self.importers}
        if format_name not in known:
            raise PluginNotFoundError(
                f"no installed plugin converts from '{format_name}'", fix=self._source(format_name, known)
            )

    def trainer_engines(self) -> list[str]:
        """Return the names of the registered engines, sorted.

        .. versionadded:: 0.1
        """
        return sorted(self._trainer_engines)

    def check_trainer_engine(self, name: str) -> None:
        """Raise PluginNotFoundError if no installed plugin has an engine called ``name``.

        .. versionadded:: 0.1
        """
        if name not in self._trainer_engines:
            raise PluginNotFoundError(
                f"no installed plugin prepares a Trainer for '{name}'", fix=self._source(name, self._trainer_engines)
            )

    def load_trainer_engine(self, name: str) -> Any:
        """Import and return the class registered as ``name``; raise PluginNotFoundError if there is none.

        .. versionadded:: 0.1
        """
        self.check_trainer_engine(name)
        return load(self._trainer_engines[name])

    def load_host_launcher(self) -> Any:
        """Import and return the function that starts processes on several hosts.

        Raises:
            PluginNotFoundError: no plugin registered one.

        .. versionadded:: 0.1
        """
        if not self._host_launchers:
            raise PluginNotFoundError(
                "no installed plugin provides a launcher for --hostfile",
                fix=f"{self._source('deepspeed', ())}, or use --nproc or torchrun",
            )
        return load(*self._host_launchers.values())

    def load_environment(self) -> dict[str, str]:
        """Call the targets of :meth:`environment` and return the variables.

        Raises:
            PluginError: two plugins set the same variable to different values; the message names both.

        .. versionadded:: 0.1
        """
        found: dict[str, str] = {}
        owners: dict[str, str] = {}
        for target in self._environments:
            for name, value in load(target)().items():
                if found.setdefault(name, value) != value:
                    raise PluginError(
                        f"{owners[name]} sets {name} to '{found[name]}', but {target} sets it to '{value}'",
                        fix=f"set {name} yourself, or uninstall one of the two",
                    )
                owners.setdefault(name, target)
        return found

    def experts_functions(self) -> dict[str, Any]:
        """Return name -> function, imported.

        .. versionadded:: 0.1
        """
        return {name: load(target) for name, target in self._experts_functions.items()}

    def rope_types(self) -> list[str]:
        """Return the registered RoPE scaling types, sorted.

        .. versionadded:: 0.1
        """
        return sorted(self._rope_types)

    def load_rope_type(self, name: str) -> Any:
        """Import and return the function registered as ``name``; raise PluginNotFoundError if there is none.

        .. versionadded:: 0.1
        """
        return _load_format(self._rope_types, name, "provides the RoPE type")

    def load_exporter(self, format_name: str) -> Any:
        """Import and return the exporter class registered as ``format_name``.

        Raises:
            PluginNotFoundError: no plugin registered one.

        .. versionadded:: 0.1
        """
        return _load_format(self._exporters, format_name, "exports to")

    def load_converter(self, format_name: str) -> Any:
        """Import and return the converter class registered as ``format_name``.

        Raises:
            PluginNotFoundError: no plugin registered one.

        .. versionadded:: 0.1
        """
        return _load_format(self._converters, format_name, "converts from")

    def _source(self, name: str, known: Iterable[str]) -> str:
        """Return how to obtain the plugin called ``name``, which registers something under its own name."""
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
