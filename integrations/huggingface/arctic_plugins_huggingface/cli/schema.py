"""``arctic schema``."""

from __future__ import annotations

import json

import click

__all__ = ["schema"]


@click.command(short_help="Print the JSON schema of a recipe, for completion in editors.")
def schema() -> None:
    """Print the JSON schema of a recipe: its keys, the options of the installed plugins, and the training arguments.

    An editor with a YAML language server completes and checks a recipe that begins with the line
    '# yaml-language-server: $schema=recipe.schema.json'. Print the schema again after installing a plugin.

    \b
    Example:
      arctic schema > recipe.schema.json
    """
    from arctic_plugins_huggingface.training.schema import recipe_schema

    found, failures = recipe_schema()
    for error in failures:
        click.echo(f"arctic: {error}", err=True)
    click.echo(json.dumps(found, indent=2, ensure_ascii=False))
