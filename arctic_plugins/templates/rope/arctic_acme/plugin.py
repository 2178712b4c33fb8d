"""The plugin ``acme``: a RoPE type for both hosts."""

from __future__ import annotations

from arctic_plugins import Plugin, Registry, hookimpl

__all__ = ["Acme"]


class Acme(Plugin):
    """The RoPE type ``acme``, which the plugin ``rope`` of arctic-plugins writes to a model's config.

    It is used wherever this package is installed and a config has the type. A recipe need not enable it.
    """

    name = "acme"
    contracts = frozenset({1})

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        registry.rope_type("acme", "arctic_acme.scaling:frequencies")
