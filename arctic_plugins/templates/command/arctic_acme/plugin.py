"""The plugin ``acme``, which has a command."""

from __future__ import annotations

from arctic_plugins import Plugin

__all__ = ["Acme"]


class Acme(Plugin):
    """The command ``arctic acme``. Enabling the plugin in a recipe changes nothing; hooks can be added here."""

    name = "acme"
    contracts = frozenset({1})
