"""``arctic train``."""

from __future__ import annotations

import sys

import click

__all__ = ["train"]


@click.command(short_help="Fine-tune a model as a recipe specifies.")
@click.argument("recipe", type=click.Path())
@click.option("--resume", is_flag=True, help="Continue the run in output_dir from its newest complete checkpoint.")
@click.option("--overwrite", is_flag=True, help="Remove the checkpoints of an earlier run in output_dir first.")
@click.option("--dry-run", is_flag=True, help="Check everything, show what would be done, and stop. Reads no weights.")
@click.option("--nproc", type=click.IntRange(min=1), help="Number of training processes to start on this machine.")
@click.option(
    "--hostfile",
    type=click.Path(),
    help="Train on the hosts listed in this file (lines of 'host slots=8'). Needs arctic-plugins-deepspeed.",
)
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print JSON.")
@click.pass_context
def train(
    context: click.Context,
    recipe: str,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    nproc: int | None,
    hostfile: str | None,
    as_json: bool,
) -> None:
    """Fine-tune the model of RECIPE, a YAML file with the keys model, plugins, load, data and training.

    SIGINT (Ctrl-C) and SIGTERM stop training after the current step and save a checkpoint; --resume continues it.

    \b
    Example:
      arctic train examples/alpaca.yaml --dry-run
      arctic train examples/alpaca.yaml
      arctic train examples/alpaca.yaml --nproc 2
    """
    import os

    # Before torch allocates: make it request huge pages (c10/core/impl/alloc_cpu.cpp, torch 2.13). The gradients and
    # logits of every step are in new memory, whose first use costs a page fault per page.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from pathlib import Path

    from rich.console import Console

    from arctic_plugins.errors import ConfigError
    from arctic_plugins.processes import is_first, is_launched
    from arctic_plugins_huggingface.cli import importing, quiet_hosts
    from arctic_plugins_huggingface.training.check import check_output, check_recipe
    from arctic_plugins_huggingface.training.recipe import Recipe

    if as_json and not dry_run:
        raise ConfigError("--json works only with --dry-run", fix="add --dry-run, or leave --json out")
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite are mutually exclusive", fix="leave one out")
    parsed = Recipe.from_file(recipe)
    if nproc is not None and hostfile is not None:
        raise ConfigError(
            "--nproc and --hostfile are mutually exclusive",
            fix="leave --nproc out: the hostfile sets the number of processes of each host",
        )
    stack = check_recipe(parsed) if hostfile is None else None  # the files it names may not be on this host
    if stack is not None and not dry_run and parsed.training.get("output_dir"):
        check_output(Path(str(parsed.training["output_dir"])), new=not resume and not overwrite)
    if nproc is None and hostfile is None and parsed.training.get("deepspeed") and not is_launched():
        nproc = 1  # the Trainer then needs the environment of a launcher, even for one process
    if nproc is not None or hostfile is not None:
        from arctic_plugins_huggingface.training.launch import launch, launch_on_hosts

        flags = {"--resume": resume, "--overwrite": overwrite, "--dry-run": dry_run, "--json": as_json}
        arguments = [
            "train",
            recipe,
            *(flag for flag, given in flags.items() if given),
            *(["--traceback"] if "--traceback" in sys.argv else []),
        ]
        context.exit(launch(arguments, nproc) if nproc is not None else launch_on_hosts(arguments, str(hostfile)))
    if is_launched():
        from arctic_plugins_huggingface.training.launch import end_with_launcher

        end_with_launcher()
    console = Console(quiet=as_json or not is_first())  # only one of several processes prints
    names = ", ".join(plugin.name for plugin in stack or ()) or "no plugins"
    console.print(
        f"{recipe}: {parsed.model} with {names}; importing torch, transformers and trl", highlight=False, soft_wrap=True
    )
    with importing():
        quiet_hosts()
        from arctic_plugins_huggingface.training.preparation import prepare
        from arctic_plugins_huggingface.training.run import train as run
    if dry_run:
        import json

        from arctic_plugins_huggingface.training.dry_run import make_plan, show_plan

        plan = make_plan(prepare(parsed, stack))
        if not is_first():
            return
        if as_json:
            click.echo(json.dumps(plan.to_dict(), indent=2))
        else:
            show_plan(plan, console)
        return
    from arctic_plugins_huggingface.training.progress import show_summary

    result = run(parsed, stack=stack, resume=resume, overwrite=overwrite, console=console)
    if not is_first():
        return
    if result is None:
        further = "to train longer with a constant schedule, move it away and increase the number of steps"
        click.echo(f"{parsed.training['output_dir']}/final is complete: there is nothing left to do ({further})")
    else:
        show_summary(result, console)
