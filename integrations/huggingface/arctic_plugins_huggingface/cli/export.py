"""``arctic export``."""

from __future__ import annotations

import click

from arctic_plugins_huggingface.cli import quiet_hosts, trust_option

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
@trust_option
def export(checkpoint: str, out: str, format_name: str, trust_remote_code: bool) -> None:
    """Convert the encoded CHECKPOINT (a directory) to OUT, which transformers and vLLM read without this project.

    \b
    Example:
      arctic export smollm2-fp8 smollm2-ct --format compressed-tensors
    """
    from arctic_plugins_huggingface.checkpoints.export import export_checkpoint

    quiet_hosts()
    export_checkpoint(checkpoint, out, format_name, trust_remote_code=trust_remote_code)
    click.echo(f"saved in {out}")
