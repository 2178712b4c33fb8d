"""``arctic doctor``: whether the installation works on this machine, and how to repair what does not."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

__all__ = ["doctor"]


@click.command(short_help="Check the installation, this machine and every plugin.")
@click.argument("recipe", required=False, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(context: click.Context, recipe: str | None, as_json: bool) -> None:
    """Check Python, hosts, compilers, distributions and plugins.

    Each plugin is loaded in a process of its own. Registration with each host is tested where the host's workers run,
    and the patches made there are listed.

    With RECIPE, also report which plugins it enables and whether they form a stack. The exit status is 1 if anything is
    broken.

    \b
    Example:
      arctic doctor recipe.yaml
    """
    from arctic_plugins.diagnosis import diagnose

    findings = diagnose(recipe)
    broken = sum(found.status == "error" for found in findings)
    if as_json:
        click.echo(json.dumps([asdict(found) for found in findings], indent=2))
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(2):
            table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}
        for found in findings:
            text = f"{found.text}\nto do: {found.fix}" if found.fix else found.text
            table.add_row(marks[found.status], escape(found.subject), escape(text))
        console = Console()
        console.print(table)
        console.print("nothing is broken" if not broken else f"{broken} broken")
    context.exit(1 if broken else 0)
