"""``arctic convert``."""

from __future__ import annotations

import click

__all__ = ["convert"]


@click.command(short_help="Read a checkpoint of another library's quantized format.")
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--from", "format_name", required=True, help="deepspeedfp, or a format that another plugin adds.")
def convert(checkpoint: str, out: str, format_name: str) -> None:
    """Write CHECKPOINT (a directory), quantized in another library's format, as the encoded checkpoint OUT.

    \b
    Example:
      arctic convert snowflake-arctic-fp8 arctic-fp8 --from deepspeedfp
    """
    from arctic_plugins_huggingface.cli import quiet_hosts
    from arctic_plugins_huggingface.exporting import convert_checkpoint

    quiet_hosts()
    for line in convert_checkpoint(checkpoint, out, format_name):
        click.echo(line)
    click.echo(f"saved in {out}")
