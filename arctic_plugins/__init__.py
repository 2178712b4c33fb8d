"""Interchangeable plugins that extend the Hugging Face Trainer and vLLM.

Importing this package loads neither torch nor a host, and its own modules only when their names are used. The public
names are in ``__all__`` of this package, of :mod:`arctic_plugins.frozen` and of :mod:`arctic_plugins.testing`, and in
the modules that ``docs/api.md`` lists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_plugins._lazy import lazily

if TYPE_CHECKING:
    from arctic_plugins.cache import cache_directory
    from arctic_plugins.claims import Claim, LinearSpec, ModulePatterns, check_patterns, matches
    from arctic_plugins.discovery import process_registry
    from arctic_plugins.errors import ArcticDeprecationWarning, ArcticError, UserError
    from arctic_plugins.host import Host
    from arctic_plugins.plugin import CONTRACT, SLOTS, THIS_MACHINE, Finding, Plugin, PluginConfig, Slot, hookimpl
    from arctic_plugins.processes import world_size
    from arctic_plugins.provenance import write_provenance
    from arctic_plugins.recorded import stack_from_checkpoint
    from arctic_plugins.registry import ROPE_MARK, ModelClasses, Registry
    from arctic_plugins.resolver import host_version
    from arctic_plugins.stack import Stack

__all__ = [
    "CONTRACT",
    "ROPE_MARK",
    "SLOTS",
    "THIS_MACHINE",
    "ArcticDeprecationWarning",
    "ArcticError",
    "Claim",
    "Finding",
    "Host",
    "LinearSpec",
    "ModelClasses",
    "ModulePatterns",
    "Plugin",
    "PluginConfig",
    "Registry",
    "Slot",
    "Stack",
    "UserError",
    "cache_directory",
    "check_patterns",
    "hookimpl",
    "host_version",
    "matches",
    "process_registry",
    "stack_from_checkpoint",
    "world_size",
    "write_provenance",
]

__getattr__ = lazily(
    __name__,
    {
        "cache": ("cache_directory",),
        "claims": (
            "Claim",
            "LinearSpec",
            "ModulePatterns",
            "check_patterns",
            "matches",
        ),
        "discovery": ("process_registry",),
        "errors": (
            "ArcticDeprecationWarning",
            "ArcticError",
            "UserError",
        ),
        "host": ("Host",),
        "plugin": (
            "CONTRACT",
            "SLOTS",
            "THIS_MACHINE",
            "Finding",
            "Plugin",
            "PluginConfig",
            "Slot",
            "hookimpl",
        ),
        "processes": ("world_size",),
        "provenance": ("write_provenance",),
        "recorded": ("stack_from_checkpoint",),
        "registry": (
            "ROPE_MARK",
            "ModelClasses",
            "Registry",
        ),
        "resolver": ("host_version",),
        "stack": ("Stack",),
    },
)
