"""The laws of plugins and of commands, and a story of a user."""

import json

import pytest
from arctic_plugins.errors import CheckpointError
from arctic_plugins.testing import CommandSuite, PluginSuite
from click.testing import CliRunner

from arctic_acme_0_1_command.command import command, sizes


class TestPlugin(PluginSuite):
    plugin = "acme-0-1-command"


class TestCommand(CommandSuite):
    commands = ["acme-0-1-command"]


def test_it_shows_the_bytes_of_a_checkpoint(tiny_checkpoint):
    size = sum(path.stat().st_size for path in tiny_checkpoint.glob("*.safetensors"))
    result = CliRunner().invoke(command, [str(tiny_checkpoint), "--json"])
    assert 0.95 * size < json.loads(result.output)["F32"] < size


@pytest.mark.parametrize("content", [b"", b"\x05" + bytes(7) + b"[1,2]", b"\xff" * 8, b"\x04" + bytes(7) + b'{"a"'])
def test_a_damaged_file_is_named(tmp_path, content):
    with pytest.raises(CheckpointError, match="contains no safetensors files"):
        sizes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors has no valid header"):
        sizes(tmp_path)
