"""``arctic completion``: completion of commands, options and names in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["completion"]


@click.command(short_help="Print a script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script with which a shell completes the commands, options, plugins and files of arctic.

    Load it in the file with which the shell starts, as in the example.

    \b
    Example:
      arctic completion bash
      eval "$(arctic completion bash)"      # in ~/.bashrc
      eval "$(arctic completion zsh)"       # in ~/.zshrc, after compinit
      arctic completion fish | source       # in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    # The name of the variable is that which click reads for a program called "arctic".
    click.echo(kind(context.find_root().command, {}, "arctic", "_ARCTIC_COMPLETE").source())
