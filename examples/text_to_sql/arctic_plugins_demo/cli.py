"""``arctic demo``."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["demo"]


@click.command(short_help="Fine-tune, merge and serve a real model, and measure it.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out/demo"),
    show_default=True,
    help="A new directory for all results.",
)
@click.option("--overwrite", is_flag=True, help="First remove the results of an earlier demo from --out.")
@click.option("--serve/--no-serve", default=True, show_default=True, help="Serve the result with vLLM at the end.")
def demo(out: Path, overwrite: bool, serve: bool) -> None:
    """Fine-tune SmolLM2-135M-Instruct over FP8 weights to write SQL, merge it, and serve it with vLLM.

    The accuracy is reported at each step.

    \b
    Example:
      arctic demo --out out/demo
    """
    import logging
    import os
    import shutil
    from importlib import import_module

    from arctic_plugins_huggingface.cli import importing, quiet_hosts
    from rich.console import Console
    from rich.progress import track

    if overwrite and (out / "train.jsonl").is_file():
        shutil.rmtree(out)
    console = Console()
    os.environ.setdefault("TQDM_DISABLE", "1")  # the demo's own progress bars show more than those of libraries
    with importing():
        for name in track(("torch", "transformers", "peft", "datasets", "trl"), "importing libraries", console=console):
            import_module(name)
        quiet_hosts()
        from arctic_plugins_huggingface import load_model

        from arctic_plugins_demo.run import run_demo
    told: set[str] = set()

    def once(record: logging.LogRecord) -> bool:
        """Filter out repeated messages: the model is loaded four times, on the same processor each time."""
        repeated = record.getMessage() in told
        told.add(record.getMessage())
        return not repeated

    logging.getLogger(load_model.__module__).addFilter(once)
    run_demo(out, serve=serve, console=console)
