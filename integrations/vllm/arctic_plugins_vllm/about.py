"""What a vLLM engine serves: the stack, who provides it, and what wrote the checkpoint. For the log and for metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arctic_plugins.discovery import installed_plugins
from arctic_plugins.provenance import FILE_NAME, read_provenance, stack_sha256

__all__ = ["SERVED", "Served", "served"]

SERVED = "arctic_plugins"
"""Key of vLLM's ``additional_config`` for the stack of ``arctic serve --plugins``, by plugin name."""

LONGEST = 2000
"""Number of characters of the stack that are logged: a checkpoint's may be of any length."""


@dataclass(frozen=True)
class Served:
    """A checkpoint, and the stack with which it is served."""

    model: str
    """Directory or Hub id."""
    stack: Mapping[str, Any] = field(default_factory=dict)
    """The plugins that made the checkpoint and those that are applied to it now, by name."""
    made_by: Mapping[str, str] = field(default_factory=dict)
    """Distribution -> version that wrote the checkpoint; empty if this project did not."""

    @property
    def plugins(self) -> dict[str, str]:
        """Each plugin of the stack with the version that is installed."""
        installed = installed_plugins()
        return {name: installed[name][0].version if name in installed else "?" for name in sorted(self.stack)}

    def labels(self, model_name: str) -> dict[str, str]:
        """Return the labels of the metric ``arctic_plugins_info``."""
        return {
            "model_name": model_name,
            "stack": ",".join(self.plugins),
            "stack_sha256": stack_sha256(self.stack) if self.stack else "",
            "plugins": ",".join(f"{name}=={installed}" for name, installed in self.plugins.items()),
            "version": version("arctic-plugins"),
        }

    def line(self) -> str:
        """Return a line for the log."""
        described = (f"{name} {installed} {self.stack[name]}" for name, installed in self.plugins.items())
        stack = ", ".join(described)[:LONGEST]
        wrote = ", ".join(f"{name} {installed}" for name, installed in self.made_by.items())
        digest = f" (sha256 {stack_sha256(self.stack)[:12]})" if self.stack else ""
        return (
            f"arctic-plugins {version('arctic-plugins')}: {self.model}: stack: {stack or 'none'}{digest}; "
            f"{f'written by {wrote}' if wrote else 'not written by arctic-plugins'}"
        )


def served(model: str, additional: Mapping[str, Any] | None = None) -> Served:
    """Describe the checkpoint ``model`` of an engine.

    Args:
        model: directory or Hub id.
        additional: vLLM's ``additional_config``.

    Raises:
        CheckpointError: see :func:`arctic_plugins.provenance.read_provenance`.
    """
    enabled = (additional or {}).get(SERVED, {})
    if not (Path(model) / FILE_NAME).is_file():
        return Served(model, enabled)
    provenance = read_provenance(model)
    made_by = {name: found for name, found in provenance.versions.items() if f"{name}{found}".isprintable()}
    return Served(model, {**provenance.stack, **enabled}, made_by)
