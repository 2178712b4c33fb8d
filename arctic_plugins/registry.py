"""What installed plugins add to a process: codec types, and formats to export to and convert from, by name, looked up
lazily.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from arctic_plugins.errors import PluginError, PluginNotFoundError, suggest

__all__ = ["FIRST_PARTY", "ROPE_MARK", "ModelClasses", "Registry", "load"]

FIRST_PARTY = frozenset({"fp8", "longseq", "lora", "moe", "offload", "rope", "shard"})
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


@dataclass
class Registry:
    """Filled once per process from the ``register`` hooks; see :func:`arctic_plugins.discovery.process_registry`."""

    failures: dict[str, Exception] = field(default_factory=dict)
    """Installed plugins that could not be loaded -> why. Raised only when something that is missing is asked for."""
    _codecs: dict[str, str] = field(default_factory=lambda: {"plain": "arctic_plugins.frozen.plain:PlainCodec"})
    _exporters: dict[str, str] = field(default_factory=dict)
    _converters: dict[str, str] = field(default_factory=dict)
    _experts_functions: dict[str, str] = field(default_factory=dict)
    _rope_types: dict[str, str] = field(default_factory=dict)
    _widening: dict[str, str] = field(default_factory=dict)
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
        _add("convertible format", self._converters, format_name, target)

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
            ours = (
                f"pip install arctic-plugins-{type_name}"
                if type_name in FIRST_PARTY
                else "install the plugin that provides it, if you trust it"
            )
            raise PluginNotFoundError(
                f"the checkpoint's codec type '{type_name}' is provided by no installed plugin",
                fix=broken or f"{ours}; {suggest(type_name, self._codecs)}",
            )
        return load(self._codecs[type_name])

    def converter_names(self) -> list[str]:
        return sorted(self._converters)

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


def _add(kind: str, table: dict[str, str], name: str, target: str) -> None:
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
