"""``arctic export``."""

from __future__ import annotations

import click

__all__ = ["export"]


@click.command(short_help="Write an encoded checkpoint in another library's format.")
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--format",
    "format_name",
    required=True,
    help="compressed-tensors, fp8-block, or a format that another plugin provides.",
)
def export(checkpoint: str, out: str, format_name: str) -> None:
    """Convert the encoded CHECKPOINT (a directory) to OUT, which transformers and vLLM read without this project.

    \b
    Example:
      arctic export smollm2-fp8 smollm2-ct --format compressed-tensors
    """
    from arctic_plugins_huggingface.checkpoints.export import export_checkpoint
    from arctic_plugins_huggingface.cli import quiet_hosts

    quiet_hosts()
    export_checkpoint(checkpoint, out, format_name)
    click.echo(f"saved in {out}")
