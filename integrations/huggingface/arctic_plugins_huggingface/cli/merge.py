"""``arctic merge``."""

from __future__ import annotations

import click

from arctic_plugins_huggingface.cli import quiet_hosts, trust_option

__all__ = ["merge"]


@click.command(short_help="Merge a LoRA adapter into its base model.")
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--base", help="The adapter's base model: a directory or Hub id. By default, the one that the adapter names."
)
@trust_option
def merge(adapter: str, out: str, base: str | None, trust_remote_code: bool) -> None:
    """Merge ADAPTER (a directory written by 'arctic train') into its base model and write the checkpoint OUT.

    The weights are encoded as in training.

    \b
    Example:
      arctic merge out/final out-merged
    """
    from arctic_plugins_huggingface.checkpoints.merge import merge_adapter

    quiet_hosts()
    click.echo(f"saved in {merge_adapter(adapter, out, base=base, trust_remote_code=trust_remote_code)}")
