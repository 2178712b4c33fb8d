"""The ``arctic`` command. Its subcommands are entry points in ``arctic_plugins.commands``, loaded when needed."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points, metadata

import click

from arctic_plugins.ending import is_distributed, leave
from arctic_plugins.errors import ArcticError, suggest

__all__ = ["COMMAND_GROUP", "main"]

COMMAND_GROUP = "arctic_plugins.commands"


@functools.cache
def _commands() -> dict[str, EntryPoint]:
    return {point.name: point for point in sorted(entry_points(group=COMMAND_GROUP), key=lambda point: point.name)}


class _Commands(click.Group):
    """A group of entry points, each imported only to run it or show its help; a broken one affects no other."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        point = _commands().get(cmd_name)
        if point is None:
            return None
        try:
            command = point.load()
        except Exception as error:  # an import can raise anything, and all of it is reported
            owner = point.dist.name if point.dist else "an unknown distribution"
            return _broken(
                cmd_name, f"command '{cmd_name}' of {owner} cannot be imported: {type(error).__name__}: {error}"
            )
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = not args or args[0].startswith("-") or args[0] in _commands()
        if not known and not ctx.resilient_parsing:  # which is set to complete a command line
            if args[0] in metadata("arctic-plugins").get_all("Provides-Extra", []):
                raise click.UsageError(
                    f"'{args[0]}' is not a command but an extra that is not installed: pip install "
                    f"'arctic-plugins[{args[0]}]'"
                )
            raise click.UsageError(f"'{args[0]}' is not a command; {suggest(args[0], _commands())}")
        return super().resolve_command(ctx, args)


def _broken(name: str, reason: str) -> click.Command:
    @click.command(name, short_help=f"(broken) {reason}", context_settings={"ignore_unknown_options": True})
    @click.argument("anything", nargs=-1)
    def command(anything: tuple[str, ...]) -> None:  # noqa: ARG001 - any arguments lead to the same error
        raise ArcticError(reason, fix="repair or uninstall its distribution")

    return command


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="arctic-plugins")
@click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    help="Show the full traceback of an error (accepted anywhere on the command line).",
)
@click.pass_context
def arctic(context: click.Context) -> None:
    """Fine-tune, encode, merge and serve models with interchangeable plugins.

    \b
    Example:
      arctic train examples/text_to_sql.yaml
      arctic merge out/final out-merged
      arctic serve out-merged
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    The exit status is 0 for success, 2 for an error in the user's input, 1 for any other error and 130 for an
    interruption. Errors are one line on stderr. The arguments are by default those of the process, which then ends
    without finalizing the interpreter: with torch imported, that takes a second.
    """
    arguments = sys.argv[1:] if args is None else args
    show_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]  # at any position
    try:
        status = arctic.main(
            arguments, prog_name="arctic", standalone_mode=False
        )  # a command's `context.exit(status)` comes back as the result
        sys.stdout.flush()
        status = status if isinstance(status, int) else 0
    except click.exceptions.Exit as error:
        status = error.exit_code
    except click.ClickException as error:
        status = _fail(error.format_message(), 2, show_traceback)
    except (click.Abort, KeyboardInterrupt):
        status = _fail("interrupted", 130, show_traceback)
    except ArcticError as error:
        status = _fail(str(error), error.exit_status, show_traceback)
    except BrokenPipeError:  # the reader of the output, for example `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:  # the last resort: one line, and how to see more
        reason = " ".join(str(error).split()) or "no message"
        status = _fail(f"{type(error).__name__}: {reason}; 'arctic --traceback ...' shows more", 1, show_traceback)
    if args is None or is_distributed():
        leave(status)
    sys.exit(status)


def _fail(message: str, status: int, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exc()
    click.echo(f"arctic: {message}", err=True)
    return status
