"""``arctic serve``."""

from __future__ import annotations

import click

__all__ = ["serve"]


@click.command(
    short_help="Serve a checkpoint with vLLM, OpenAI-compatible.",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("checkpoint")
@click.option(
    "--base",
    help="For an adapter: its base model, a directory or hub id; encoded with 'arctic quantize' if the adapter was "
    "trained so.",
)
@click.option(
    "--plugins",
    help="Encode a plain checkpoint while it is loaded: plugin names, separated by commas, or JSON as for 'arctic "
    "quantize'.",
)
@click.pass_context
def serve(context: click.Context, checkpoint: str, base: str | None, plugins: str | None) -> None:
    """Serve CHECKPOINT (a directory or hub id, or a LoRA adapter that 'arctic train' wrote) over HTTP with the OpenAI
    API.

    All other options go to vLLM's server as they are. The exit status is 0 when it was stopped, and 70 when vLLM's
    engine died, so that a supervisor starts it again.

    \b
    Example:
      arctic serve out-merged --port 8000 --max-model-len 4096
      arctic serve HuggingFaceTB/SmolLM2-135M-Instruct --plugins fp8
    """
    import os
    import sys

    from arctic_plugins.errors import ConfigError
    from arctic_plugins.stack import Stack, parse_plugins
    from arctic_plugins_vllm.serving import server_command, server_options

    if checkpoint.startswith("-"):  # click gives options that it does not know to the argument
        raise ConfigError(
            f"{checkpoint} stands where CHECKPOINT is expected",
            fix="write 'arctic serve CHECKPOINT', then vLLM's options",
        )
    stack = None if plugins is None else Stack.from_dict(parse_plugins(plugins))
    values, environment = server_options(checkpoint, context.args, base=base, plugins=stack)
    command = server_command(values, context.args)
    if "dtype" in values:
        dtype = values["dtype"]
        click.echo(
            f"arctic: --dtype {dtype}: this processor does not multiply the dtype of the checkpoint (set it yourself "
            "for another)",
            err=True,
        )
    for name, value in environment.items():
        click.echo(f"arctic: {name}={value} (set it yourself for another value)", err=True)
    sys.stdout.flush()
    # No file of the working directory, a checkpoint's for one, is imported for a module of that name: here, and in
    # vLLM's processes.
    os.execve(sys.executable, [sys.executable, "-P", *command], {**os.environ, "PYTHONSAFEPATH": "1", **environment})  # noqa: S606 - the server takes our place and our signals
