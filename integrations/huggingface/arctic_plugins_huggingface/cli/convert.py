"""``arctic convert``."""

from __future__ import annotations

import click

__all__ = ["convert"]


@click.command(short_help="Read a checkpoint of another library: quantized, or DeepSpeed's LoRA.")
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--from", "format_name", required=True, help="deepspeed, deepspeedfp, or a format that another plugin adds."
)
@click.option(
    "--scaling",
    type=click.Choice(["alpha/r", "alpha/sqrt(r)"]),
    help="deepspeed: what updates are multiplied by; alpha/r if left out.",
)
@click.option("--alpha", type=float, help="deepspeed: alpha, where config.json does not say it.")
@click.option(
    "--base",
    help="deepspeed: the model that was trained; OUT becomes a PEFT adapter on it instead of a merged checkpoint.",
)
def convert(
    checkpoint: str, out: str, format_name: str, scaling: str | None, alpha: float | None, base: str | None
) -> None:
    """Write CHECKPOINT (a directory) of another library's format as OUT.

    deepspeedfp is a quantized model, and OUT an encoded one. deepspeed is a training run, of DeepSpeed-MoE or of
    OptimizedLinear with LoRA, its weights perhaps in parts, and OUT a model, with LoRA merged, or an adapter.

    \b
    Example:
      arctic convert snowflake-arctic-fp8 arctic-fp8 --from deepspeedfp
      arctic convert old-run/global_step100 adapter --from deepspeed --base meta-llama/Llama-3.1-8B
    """
    from arctic_plugins.errors import ConfigError

    if format_name != "deepspeed" and (scaling or alpha is not None or base):
        raise ConfigError(
            f"--scaling, --alpha and --base are for --from deepspeed, not {format_name}", fix="leave them out"
        )
    from arctic_plugins_huggingface.checkpoints.export import convert_checkpoint
    from arctic_plugins_huggingface.cli import quiet_hosts

    quiet_hosts()
    if format_name == "deepspeed":
        from arctic_plugins_huggingface.checkpoints.deepspeed import convert_deepspeed

        for line in convert_deepspeed(checkpoint, out, scaling=scaling or "alpha/r", alpha=alpha, base=base):  # type: ignore[arg-type]
            click.echo(line)
        click.echo(f"saved in {out}")
        return
    for line in convert_checkpoint(checkpoint, out, format_name):
        click.echo(line)
    click.echo(f"saved in {out}")
