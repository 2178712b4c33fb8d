"""``arctic quantize``."""

from __future__ import annotations

import click

__all__ = ["quantize"]


@click.command(short_help="Encode a model's weights and save it.")
@click.argument("model")
@click.argument("out", type=click.Path())
@click.option("--plugins", default="fp8", show_default=True, help='Plugin names, separated by commas, or JSON: \'{"fp8": {"group_size": 128}}\'.')
def quantize(model: str, out: str, plugins: str) -> None:
    """Encode MODEL (a directory or hub id) with the given plugins and write the checkpoint OUT.

    \b
    Example:
      arctic quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-fp8 --plugins fp8
    """
    from arctic_plugins.errors import ConfigError
    from arctic_plugins.stack import Stack, parse_plugins

    stack = Stack.from_dict(parse_plugins(plugins))
    if not stack.only("weight_codec"):
        raise ConfigError(f"--plugins {plugins} encodes nothing", expected="a plugin that fills 'weight_codec'", fix="--plugins fp8")
    from arctic_plugins_huggingface.cli import quiet_hosts
    from arctic_plugins_huggingface.loading import encoding_report, is_encoded, load_config, load_model
    from arctic_plugins_huggingface.saving import check_new, save_checkpoint

    quiet_hosts()
    check_new(out)
    if is_encoded(load_config(model)):
        raise ConfigError(f"{model} is encoded already", expected="a plain checkpoint")
    encoded, tokenizer = load_model(model, stack)
    for line in encoding_report(encoded):
        click.echo(line)
    save_checkpoint(encoded, tokenizer, out, stack)
    click.echo(f"saved in {out}: {encoded.get_memory_footprint() / 1e6:.0f} MB of weights")
