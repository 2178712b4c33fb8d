"""``arctic plugins``: the installed plugins, whether they work, and which options they take."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from arctic_plugins.plugin import Plugin

__all__ = ["plugins"]


def _names(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the names for completion in a shell, without importing plugins."""
    from arctic_plugins.discovery import installed_plugins

    return [name for name in installed_plugins() if name.startswith(incomplete)]


@click.command(short_help="List installed plugins, or the options of one.")
@click.argument("name", required=False, shell_complete=_names)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(name: str | None, as_json: bool) -> None:
    """List the installed plugins: name, distribution, version, the slots they fill, and the cause if one is broken.

    With NAME, show the options of that plugin: what each means, its default and its type.

    \b
    Example:
      arctic plugins
      arctic plugins fp8
    """
    from arctic_plugins.discovery import load_plugin

    if name is not None:
        described = _described(load_plugin(name))
        click.echo(json.dumps(described, indent=2) if as_json else _in_words(described))
        return
    rows = _installed()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo("no plugins are installed: pip install 'arctic-plugins[all]'")
        return
    owners = [f"{row['distribution']} {row['version']}" for row in rows]
    widths = max(len(row["name"]) for row in rows), max(map(len, owners))
    for row, owner in zip(rows, owners, strict=True):
        status = f"broken: {row['error']}" if row["error"] else f"ok  {', '.join(row['slots'])}"
        click.echo(f"{row['name']:{widths[0]}}  {owner:{widths[1]}}  {status}".rstrip())
    click.echo("\n'arctic plugins NAME' shows the options of a plugin.")


def _installed() -> list[dict[str, Any]]:
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
                {
                    **row,
                    "slots": sorted(plugin.slots),
                    "hosts": dict(plugin.hosts),
                    "options": sorted(plugin.config.model_fields),
                    "error": None,
                }
            )
        except PluginError as error:
            rows.append({**row, "slots": [], "hosts": {}, "options": [], "error": str(error)})
    return rows


def _described(plugin: type[Plugin]) -> dict[str, Any]:
    """Describe a plugin with JSON types only. A required option has no default."""
    from arctic_plugins.prose import first_paragraph, paragraphs

    schema = plugin.config.model_json_schema(by_alias=False)
    options = [
        {
            "name": name,
            "type": _kind(schema["properties"][name]),
            "required": field.is_required(),
            "default": schema["properties"][name].get("default"),
            "meaning": " ".join(paragraphs(field.description)),
        }
        for name, field in plugin.config.model_fields.items()
    ]
    return {
        "name": plugin.name,
        "meaning": first_paragraph(inspect.getdoc(plugin)),
        "slots": sorted(plugin.slots),
        "contracts": sorted(plugin.contracts),
        "trainer_mixins": _mixins(plugin),
        "options": options,
    }


def _mixins(plugin: type[Plugin]) -> list[str]:
    """Return what a plugin with default options adds to a Trainer's class; nothing if an option is required."""
    if any(field.is_required() for field in plugin.config.model_fields.values()):
        return []
    return list(plugin.from_options({}).trainer_mixins)


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _kind(schema: dict[str, Any]) -> str:
    """Return what a JSON schema accepts, in words: ``"max" or "mse"``, ``integer >= 1``."""
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return "list" if "items" not in schema else f"list of {_kind(schema['items'])}"
    bounds = ", ".join(f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema)
    return f"{schema.get('type', 'object').replace('object', 'mapping')} {bounds}".rstrip()


def _in_words(described: dict[str, Any]) -> str:
    paragraphs = [
        f"{described['name']}: {described['meaning']}",
        f"Slots: {', '.join(described['slots']) or 'none'}",
        *(f"Contract: {' or '.join(map(str, described['contracts']))}" for _ in described["contracts"][:1]),
        *(f"Adds to the Trainer: {', '.join(described['trainer_mixins'])}" for _ in described["trainer_mixins"][:1]),
        "",
    ]
    lines = [
        click.wrap_text(text, 80)
        for text in [*paragraphs, "Options:" if described["options"] else "It takes no options."]
    ]
    for option in described["options"]:
        default = "required" if option["required"] else f"default {json.dumps(option['default'])}"
        lines += ["", click.wrap_text(f"{option['name']}: {option['type']}; {default}", 80, "  ", "    ")]
        lines += [click.wrap_text(option["meaning"], 80, "      ", "      ")] if option["meaning"] else []
    return "\n".join(lines)
