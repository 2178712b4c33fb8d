"""``arctic generate``."""

from __future__ import annotations

import click

__all__ = ["generate"]


@click.command(short_help="Answer a prompt with a checkpoint.")
@click.argument("checkpoint")
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Length of the answer at most.")
def generate(checkpoint: str, prompt: str, max_new_tokens: int) -> None:
    """Answer PROMPT greedily with CHECKPOINT: a model (plain or encoded, a directory or hub id) or an adapter directory.

    \b
    Example:
      arctic generate out-merged "Name three rivers."
    """
    from arctic_plugins_huggingface.cli import importing, quiet_hosts

    with importing():
        quiet_hosts()
        from arctic_plugins_huggingface.generation import answer
        from arctic_plugins_huggingface.saving import load_checkpoint
    model, tokenizer = load_checkpoint(checkpoint)
    click.echo(next(iter(answer(model, tokenizer, [prompt], max_new_tokens=max_new_tokens))))
