"""``arctic serve``."""

from __future__ import annotations

import click

__all__ = ["serve"]


@click.command(
    short_help="Serve a checkpoint with vLLM, OpenAI-compatible.",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("checkpoint")
@click.option("--base", help="For an adapter: the encoded base model, made with 'arctic quantize'.")
@click.option("--plugins", help="Encode a plain checkpoint while it is loaded: plugin names, separated by commas, or JSON as for 'arctic quantize'.")
@click.pass_context
def serve(context: click.Context, checkpoint: str, base: str | None, plugins: str | None) -> None:
    """Serve CHECKPOINT (a directory or hub id, or a LoRA adapter that 'arctic train' wrote) over HTTP with the OpenAI API.

    All other options go to vLLM's server as they are.

    \b
    Example:
      arctic serve out-merged --port 8000 --max-model-len 4096
      arctic serve HuggingFaceTB/SmolLM2-135M-Instruct --plugins fp8
    """
    import os
    import sys

    from arctic_plugins.errors import ConfigError
    from arctic_plugins.stack import Stack, parse_plugins
    from arctic_plugins_vllm.serving import server_command

    if checkpoint.startswith("-"):  # click gives options that it does not know to the argument
        raise ConfigError(f"{checkpoint} stands where CHECKPOINT is expected", fix="write 'arctic serve CHECKPOINT', then vLLM's options")
    stack = None if plugins is None else Stack.from_dict(parse_plugins(plugins))
    command, environment = server_command(checkpoint, context.args, base=base, plugins=stack)
    if "--dtype" in command and not any(option.partition("=")[0] == "--dtype" for option in context.args):
        dtype = command[command.index("--dtype") + 1]
        click.echo(f"arctic: --dtype {dtype}: this processor does not multiply the dtype of the checkpoint (set it yourself for another)", err=True)
    for name, value in environment.items():
        click.echo(f"arctic: {name}={value} (set it yourself for another value)", err=True)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *command], {**os.environ, **environment})  # noqa: S606 - the server takes our place and our signals
