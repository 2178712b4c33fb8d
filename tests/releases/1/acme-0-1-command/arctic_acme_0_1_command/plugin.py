"""The plugin ``acme-0-1-command``, which has a command."""

from __future__ import annotations

from arctic_plugins import Plugin

__all__ = ["Acme01Command"]


class Acme01Command(Plugin):
    """The command ``arctic acme-0-1-command``. Enabling the plugin in a recipe changes nothing; hooks can be added here."""

    name = "acme-0-1-command"
    contracts = frozenset({1})
