"""What installed plugins add to a process: codec types by name, looked up lazily."""

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
    _codecs: dict[str, str] = field(default_factory=dict)

    def codec(self, type_name: str, target: str) -> None:
        """Add a codec type.

        Args:
            type_name: the ``type`` that stands in a checkpoint's ``quantization_config.codecs``.
            target: ``"module:attribute"`` of a :class:`~arctic_plugins.frozen.codec.Codec` class.

        Raises:
            PluginError: the name is taken by another target; the message names both.
        """
        taken = self._codecs.setdefault(type_name, target)
        if taken != target:
            raise PluginError(f"codec type '{type_name}' is registered by {taken} and by {target}", fix="uninstall one of the two")

    def codec_types(self) -> list[str]:
        return sorted(self._codecs)

    def load_codec(self, type_name: str) -> Any:
        """Import and return the codec class registered as ``type_name``.

        Raises:
            PluginNotFoundError: nobody registered it; says which plugin would, or which installed plugin failed to load.
        """
        try:
            module, _, attribute = self._codecs[type_name].partition(":")
        except KeyError:
            broken = "; ".join(str(error) for error in self.failures.values())
            raise PluginNotFoundError(
                f"the checkpoint's codec type '{type_name}' is provided by no installed plugin",
                fix=broken
                or f"install the plugin that provides it (first-party: pip install arctic-plugins-{type_name}); {suggest(type_name, self._codecs)}",
            ) from None
        return getattr(importlib.import_module(module), attribute)
