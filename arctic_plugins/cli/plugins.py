"""``arctic plugins``: what is installed, and whether it works."""

from __future__ import annotations

import json
from typing import Any

import click

__all__ = ["plugins"]


@click.command(short_help="List installed plugins, and why a broken one is broken.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(as_json: bool) -> None:
    """List the installed plugins: name, distribution, version, the slots they fill, and the cause if one is broken.

    \b
    Example:
      arctic plugins --json
    """
    from arctic_plugins.discovery import installed_plugins, load_plugin
    from arctic_plugins.errors import PluginError

    rows = []
    for name, providers in installed_plugins().items():
        row: dict[str, Any] = {
            "name": name,
            "distribution": " and ".join(provider.distribution for provider in providers),
            "version": " and ".join(provider.version for provider in providers),
        }
        try:
            plugin = load_plugin(name)
            rows.append(
                {**row, "slots": sorted(plugin.slots), "hosts": dict(plugin.hosts), "options": sorted(plugin.config.model_fields), "error": None}
            )
        except PluginError as error:
            rows.append({**row, "slots": [], "hosts": {}, "options": [], "error": str(error)})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("plugin", "distribution", "version", "slots", "options", "status")
    for row in rows:
        status = f"[red]broken:[/] {row['error']}" if row["error"] else "ok"
        table.add_row(str(row["name"]), str(row["distribution"]), str(row["version"]), ", ".join(row["slots"]), ", ".join(row["options"]), status)
    Console().print(table if rows else "no plugin is installed: pip install 'arctic-plugins[all]'")
