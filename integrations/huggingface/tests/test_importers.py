"""``arctic convert`` of formats that plugins read with options of their own."""

import pytest

from arctic_plugins.cli import main
from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import PluginError

READER = """
from typing import Literal
from arctic_plugins import Plugin, PluginConfig, hookimpl

class Options(PluginConfig):
    '''A model of {name}.'''
    number: int = 1
    '''How often.'''
    loud: bool = False
    only_{name}: Literal["a", "b"]

class plugin(Plugin):
    name = "{name}"
    @classmethod
    @hookimpl
    def register(cls, registry):
        registry.importer("{name}", "{name}_plugin:read", Options)

def read(checkpoint, directory, options):
    return [f"{{checkpoint}} to {{directory}}", repr(options)]
"""


@pytest.fixture
def arctic(capsys):
    """A function that runs the command in this process and gives (exit status, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["convert", *arguments])
        return ended.value.code, *capsys.readouterr()

    return run


def test_an_importer_gets_its_own_options(install_plugin, arctic):
    install_plugin("one", READER.format(name="one"))
    status, output, error = arctic("old", "new", "--from", "one", "--number", "3", "--loud", "--only-one", "b")
    assert status == 0, error
    assert output.splitlines() == ["old to new", "Options(number=3, loud=True, only_one='b')", "saved in new"]
    assert "Options(number=1, loud=False, only_one='a')" in arctic("old", "new", "--from", "one", "--only-one", "a")[1]
    assert "--from one needs --only-one; add it" in arctic("old", "new", "--from", "one")[2]
    assert "'--number': 'x' is not a valid int" in arctic("old", "new", "--from", "one", "--number", "x")[2]
    assert "nowhere has no config.json" in arctic("nowhere", "new", "--from", "deepspeedfp")[2], "a flag is not given"
    _, output, _ = arctic("--help")
    assert "one A model of one." in " ".join(output.split())
    assert "--number INTEGER one: How often." in " ".join(output.split())


def test_two_importers_may_have_the_same_option(install_plugin, arctic):
    for name in ("one", "two"):
        install_plugin(name, READER.format(name=name))
    for name in ("one", "two"):
        assert "(number=3, " in arctic("old", "new", "--from", name, "--number", "3", f"--only-{name}", "a")[1]
    assert (
        "--number is 'x'; expected a valid integer"
        in arctic("old", "new", "--from", "two", "--number", "x", "--only-two", "a")[2]
    )
    status, _, error = arctic("old", "new", "--from", "two", "--only-one", "a")
    assert status == 2
    assert error == "arctic: --number, --loud and --only-one are for --from one, not two; leave them out\n"
    assert "one: How often. two: How often." in " ".join(arctic("--help")[1].split())


def test_a_format_has_one_reader(install_plugin):
    source = READER.format(name="one").replace('registry.importer("one"', 'registry.importer("deepspeedfp"')
    install_plugin("one", source)
    with pytest.raises(
        PluginError,
        match="convertible format 'deepspeedfp' is registered by .*(DeepSpeedFPConverter|one_plugin:read) and by .*",
    ):
        process_registry()
