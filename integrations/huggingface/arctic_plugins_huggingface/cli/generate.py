"""``arctic generate``."""

from __future__ import annotations

import click

from arctic_plugins_huggingface.cli import importing, quiet_hosts, trust_option

__all__ = ["generate"]


@click.command(short_help="Answer a prompt with a checkpoint.")
@click.argument("checkpoint")
@click.argument("prompt")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Maximum length of the answer."
)
@click.option(
    "--plugins",
    help="Plugins to apply while loading, such as 'offload': names separated by commas, or JSON as for 'arctic "
    "quantize'.",
)
@click.option(
    "--base", help="Base model of an adapter: a directory or Hub id. By default, the one that the adapter names."
)
@trust_option
def generate(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int,
    plugins: str | None,
    base: str | None,
    trust_remote_code: bool,
) -> None:
    """Answer PROMPT greedily with CHECKPOINT: a model (plain or encoded, a directory or Hub id) or an adapter
    directory.

    \b
    Example:
      arctic generate out-merged "Name three rivers."
      arctic generate out/final "Name three rivers." --plugins '{"offload": {"to": "disk"}}'
    """
    from arctic_plugins.stack import Stack, parse_plugins

    stack = Stack() if plugins is None else Stack.from_dict(parse_plugins(plugins))
    with importing():
        quiet_hosts()
        from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
        from arctic_plugins_huggingface.generate import answer
        from arctic_plugins_huggingface.loading.config import text_tokenizer
    model, tokenizer = load_checkpoint(
        checkpoint, stack, base=base, trust_remote_code=trust_remote_code, generates=True
    )
    click.echo(next(iter(answer(model, text_tokenizer(tokenizer), [prompt], max_new_tokens=max_new_tokens))))
