"""What installed plugins add to a process: codec types, and formats to export to and convert from, by name, looked up lazily."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from arctic_plugins.errors import PluginError, PluginNotFoundError, suggest

__all__ = ["Registry"]


@dataclass
class Registry:
    """Filled once per process from the ``register`` hooks; see :func:`arctic_plugins.discovery.process_registry`."""

    failures: dict[str, Exception] = field(default_factory=dict)
    """Installed plugins that could not be loaded -> why. Raised only when something that is missing is asked for."""
    _codecs: dict[str, str] = field(default_factory=lambda: {"plain": "arctic_plugins.frozen.plain:PlainCodec"})
    _exporters: dict[str, str] = field(default_factory=dict)
    _converters: dict[str, str] = field(default_factory=dict)

    def codec(self, type_name: str, target: str) -> None:
        """Add a codec type.

        Args:
            type_name: the ``type`` that stands in a checkpoint's ``quantization_config.codecs``.
            target: ``"module:attribute"`` of a :class:`~arctic_plugins.frozen.codec.Codec` class.

        Raises:
            PluginError: the name is taken by another target; the message names both.
        """
        _add("codec type", self._codecs, type_name, target)

    def exporter(self, format_name: str, target: str) -> None:
        """Add a format of ``arctic export``: ``target`` is ``"module:attribute"`` of a :class:`~arctic_plugins.frozen.exporting.Exporter` class.

        Raises:
            PluginError: the name is taken by another target; the message names both.
        """
        _add("export format", self._exporters, format_name, target)

    def converter(self, format_name: str, target: str) -> None:
        """Add a format of ``arctic convert``: ``target`` is ``"module:attribute"`` of a :class:`~arctic_plugins.frozen.exporting.Converter` class.

        Raises:
            PluginError: the name is taken by another target; the message names both.
        """
        _add("convertible format", self._converters, format_name, target)

    def codec_types(self) -> list[str]:
        return sorted(self._codecs)

    def load_codec(self, type_name: str) -> Any:
        """Import and return the codec class registered as ``type_name``.

        Raises:
            PluginNotFoundError: nobody registered it; says which plugin would, or which installed plugin failed to load.
        """
        if type_name not in self._codecs:
            broken = "; ".join(str(error) for error in self.failures.values())
            raise PluginNotFoundError(
                f"the checkpoint's codec type '{type_name}' is provided by no installed plugin",
                fix=broken
                or f"install the plugin that provides it (first-party: pip install arctic-plugins-{type_name}); {suggest(type_name, self._codecs)}",
            )
        return _load(self._codecs[type_name])

    def converter_names(self) -> list[str]:
        return sorted(self._converters)

    def load_exporter(self, format_name: str) -> Any:
        """Import and return the exporter class registered as ``format_name``; raises PluginNotFoundError when nobody registered it."""
        return _load_format(self._exporters, format_name, "exports to")

    def load_converter(self, format_name: str) -> Any:
        """Import and return the converter class registered as ``format_name``; raises PluginNotFoundError when nobody registered it."""
        return _load_format(self._converters, format_name, "converts from")


def _add(kind: str, table: dict[str, str], name: str, target: str) -> None:
    taken = table.setdefault(name, target)
    if taken != target:
        raise PluginError(f"{kind} '{name}' is registered by {taken} and by {target}", fix="uninstall one of the two")


def _load_format(table: dict[str, str], name: str, does: str) -> Any:
    if name not in table:
        raise PluginNotFoundError(f"no installed plugin {does} '{name}'", fix=suggest(name, table))
    return _load(table[name])


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
