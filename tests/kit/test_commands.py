"""Each law of commands finds a command that breaks it."""

import os

import pytest

from arctic_plugins import cli
from arctic_plugins.testing import CommandSuite

SOUND = '''
import click

@click.command(short_help="Try the kit.")
@click.option("--times", help="How often.")
def plugin(times):
    """Try the kit.

    \\b
    Example:
      arctic kit --times 3
    """
'''
HELP, LIGHT, DESCRIBED, NO_OPTION = (
    "help_shows_an_example",
    "help_loads_neither_torch_nor_a_host",
    "everything_is_described",
    "what_is_no_option_is_one_line",
)
MUTANTS = {
    "sound": ("", "", set()),
    "example": ("Example:", "Such as:", {HELP}),
    "heavy": ("import click", "import click, torch", {LIGHT}),
    "help": (', help="How often."', "", {DESCRIBED}),
    "option": (
        'kit.")',
        "kit.\", context_settings={'ignore_unknown_options': True})\n@click.argument('more')",
        {NO_OPTION},
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_command_breaks_its_law_and_no_other(broken_laws, install_plugin, monkeypatch, capsys, name):
    before, after, laws = MUTANTS[name]
    site = install_plugin("kit", SOUND.replace(before, after) if before else SOUND, group=cli.COMMAND_GROUP)
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    cli._commands.cache_clear()
    try:
        assert broken_laws(CommandSuite(), command="kit", capsys=capsys) == laws
    finally:
        cli._commands.cache_clear()


def test_every_law_has_a_mutant():
    assert {f"test_{law}" for _, _, laws in MUTANTS.values() for law in laws} == CommandSuite.laws().keys()
