"""The plugin ``acme-0-1-rope``: a RoPE type for both hosts."""

from __future__ import annotations

from arctic_plugins import Plugin, Registry, hookimpl

__all__ = ["Acme01Rope"]


class Acme01Rope(Plugin):
    """The RoPE type ``acme-0-1-rope``, which the plugin ``rope`` of arctic-plugins writes to a model's config.

    It is used wherever this package is installed and a config has the type. A recipe need not enable it.
    """

    name = "acme-0-1-rope"
    contracts = frozenset({1})

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        registry.rope_type("acme-0-1-rope", "arctic_acme_0_1_rope.scaling:frequencies")
