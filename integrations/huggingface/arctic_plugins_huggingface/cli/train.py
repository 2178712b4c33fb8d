"""``arctic train``."""

from __future__ import annotations

import click

__all__ = ["train"]


@click.command(short_help="Fine-tune a model as a recipe says.")
@click.argument("recipe", type=click.Path())
def train(recipe: str) -> None:
    """Fine-tune the model of RECIPE, a YAML file with the keys model, plugins, data and training.

    \b
    Example:
      arctic train examples/alpaca.yaml
    """
    from arctic_plugins_huggingface.recipe import Recipe

    parsed = Recipe.from_file(recipe)
    from arctic_plugins_huggingface.sft import train as run

    result = run(parsed)
    click.echo(f"trained {result.steps} steps in {result.seconds:.0f} s; saved in {result.directory}")
