"""The laws of commands of ``arctic``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, ClassVar

import pytest

from arctic_plugins.testing.processes import run_python
from arctic_plugins.testing.suite import Suite

__all__ = ["CommandSuite"]

_HELP = """
import sys
from arctic_plugins.cli import arctic
from arctic_plugins.host import hosts
arctic.main([sys.argv[1], "--help"], standalone_mode=False)
print(*sorted({"torch", *hosts()} & sys.modules.keys()))
"""


class CommandSuite(Suite):
    """The laws of commands in the entry-point group ``arctic_plugins.commands``.

    Subclass it::

        class TestMyCommand(CommandSuite):
            commands = ["my-command"]
    """

    over = {"command": "commands"}

    commands: ClassVar[Sequence[str]]
    """Names of installed commands."""

    def test_help_shows_an_example(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        status, output, error = _arctic(capsys, command, "--help")
        assert status == 0, f"arctic {command} --help ends with status {status}: {error}"
        assert f"Example:\n    arctic {command}" in output, f"the help of {command} shows no example:\n{output}"

    def test_help_loads_neither_torch_nor_a_host(self, command: str) -> None:
        found = run_python("-c", _HELP, command).stdout.splitlines()[-1].split()
        assert not found, f"arctic {command} --help imports {found}; import them in the function"

    def test_everything_is_described(self, command: str) -> None:
        import click

        loaded = _load(command)
        assert loaded.get_short_help_str(), f"{command} has no short help, which 'arctic --help' shows"
        for parameter in loaded.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.help, f"the option {'/'.join(parameter.opts)} of {command} has no help"

    def test_what_is_no_option_is_one_line(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        status, _, error = _arctic(capsys, command, "--no-such-option")
        assert status == 2, f"arctic {command} --no-such-option ends with status {status}; expected 2"
        assert len(error.splitlines()) == 1, f"arctic {command} --no-such-option prints {error!r}; expected one line"


def _arctic(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    from arctic_plugins.cli import main

    with pytest.raises(SystemExit) as raised:
        main(list(arguments))
    output, error = capsys.readouterr()
    return raised.value.code, output, error


def _load(command: str) -> Any:
    from arctic_plugins.cli import COMMAND_GROUP

    [point] = entry_points(group=COMMAND_GROUP, name=command)
    return point.load()
