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
    help="For an adapter: its base model, a directory or Hub id; encoded with 'arctic quantize' if the adapter was "
    "trained on an encoded base.",
)
@click.option(
    "--plugins",
    help="Plugins in addition to those that CHECKPOINT records: names, separated by commas, or JSON as for 'arctic "
    "quantize'. Those that encode weights, such as fp8, do so while a plain checkpoint is loaded. Those that only "
    "configure vLLM, such as speculate, work with every checkpoint.",
)
@click.option(
    "--lora",
    "adapters",
    multiple=True,
    metavar="NAME=PATH",
    help="Also serve the adapter in the directory PATH, in PEFT's format, as the model NAME. Can be repeated.",
)
@click.pass_context
def serve(
    context: click.Context, checkpoint: str, base: str | None, plugins: str | None, adapters: tuple[str, ...]
) -> None:
    """Serve CHECKPOINT (a directory or Hub id, or a LoRA adapter that 'arctic train' wrote) over HTTP with the OpenAI
    API.

    All other options are passed to vLLM's server unchanged. The exit status is 0 if the server was stopped, and 70 if
    vLLM's engine died, so that a supervisor restarts it.

    \b
    Example:
      arctic serve out-merged --port 8000 --max-model-len 4096
      arctic serve HuggingFaceTB/SmolLM2-135M-Instruct --plugins fp8
      arctic serve out-merged --plugins speculate
      arctic serve base --lora sql=out/final --lora chat=other
    """
    import os
    import sys

    from arctic_plugins.errors import ConfigError
    from arctic_plugins.stack import Stack, parse_plugins
    from arctic_plugins_vllm.about import SERVED
    from arctic_plugins_vllm.adapters import parse_adapters
    from arctic_plugins_vllm.serving import check_address, server_command, server_options

    if checkpoint.startswith("-"):  # click passes unknown options to the argument
        raise ConfigError(
            f"found {checkpoint} in place of CHECKPOINT",
            fix="write 'arctic serve CHECKPOINT', followed by vLLM's options",
        )
    check_address(context.args)
    stack = None if plugins is None else Stack.from_dict(parse_plugins(plugins))
    values, environment = server_options(
        checkpoint, context.args, base=base, plugins=stack, adapters=parse_adapters(adapters)
    )
    if stack is not None:
        values["additional_config"] = {SERVED: stack.to_dict()}  # shown in the server's log and metrics
    command = server_command(values, context.args)
    if "dtype" in values:
        dtype = values["dtype"]
        click.echo(
            f"arctic: --dtype {dtype}: this processor cannot multiply the checkpoint's dtype natively (set --dtype to "
            "use another)",
            err=True,
        )
    for name, value in environment.items():
        click.echo(f"arctic: {name}={value} (set the variable to use another value)", err=True)
    sys.stdout.flush()
    # Here and in vLLM's processes, no file in the working directory (for example a checkpoint's) is imported in place
    # of a module of the same name.
    os.execve(sys.executable, [sys.executable, "-P", *command], {**os.environ, "PYTHONSAFEPATH": "1", **environment})  # noqa: S606 - the server replaces this process and gets its signals
