"""The laws of plugins and of commands, and a story of a user."""

import json

import pytest
from arctic_plugins.cli import main
from arctic_plugins.testing import CommandSuite, PluginSuite


class TestPlugin(PluginSuite):
    plugin = "acme"


class TestCommand(CommandSuite):
    commands = ["acme"]


@pytest.fixture
def arctic(capsys):
    """A function that runs the command, and returns its exit status and both outputs."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["acme", *map(str, arguments)])
        return end.value.code, *capsys.readouterr()

    return run


def test_it_shows_the_bytes_of_a_checkpoint(arctic, tiny_checkpoint):
    status, output, _ = arctic(tiny_checkpoint, "--json")
    assert status == 0
    size = sum(path.stat().st_size for path in tiny_checkpoint.glob("*.safetensors"))
    assert 0.95 * size < json.loads(output)["F32"] < size


def test_what_is_no_checkpoint_is_one_line(arctic, tmp_path):
    status, output, error = arctic(tmp_path)
    assert (status, output, error.count("\n")) == (2, "", 1)
    (tmp_path / "model.safetensors").write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00[1,2]")
    assert "model.safetensors has no valid header" in arctic(tmp_path)[2]
