"""The command line: fast to answer, one line per error, harmed by no broken plugin."""

import json
import subprocess
import sys
import time

import pytest

from arctic_plugins import cli
from arctic_plugins.cli import main
from arctic_plugins.testing import CommandSuite, run_python

COMMANDS = ["demo", "generate", "merge", "plugins", "quantize", "serve", "train"]


def arctic(*arguments, status=0, **environment):
    """The command in a process of its own, for what depends on one."""
    return run_python("-m", "arctic_plugins.cli", *arguments, status=status, environment=environment)


@pytest.fixture
def here(capsys):
    """A function that runs the command in this process and gives (exit status, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as raised:
            main(list(arguments))
        return raised.value.code, *capsys.readouterr()

    return run


def test_help_lists_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; from arctic_plugins.cli import arctic; "
        "arctic.main(['--help'], standalone_mode=False); print([m for m in ('torch', 'transformers', 'vllm', "
        "'pydantic') if m in sys.modules])"
    )
    output = run_python("-c", code).stdout
    assert output.splitlines()[-1] in ("[]", "['pydantic']")
    assert all(f"  {command} " in output for command in COMMANDS)
    assert "(broken)" not in output


class TestCommands(CommandSuite):
    commands = sorted(cli._commands())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "'trian' is not a command; did you mean 'train'?"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["quantize", "nowhere", "out", "--plugins", "fp9"], "did you mean 'fp8'"),
        (["quantize", "nowhere", "out", "--plugins", "lora"], "encodes nothing"),
    ],
)
def test_bad_input_is_one_line_and_status_2(here, arguments, message):
    status, _, error = here(*arguments)
    assert status == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_command_of_an_extra_says_what_to_install(here, monkeypatch):
    commands = {name: point for name, point in cli._commands().items() if name != "demo"}
    monkeypatch.setattr(cli, "_commands", lambda: commands)
    assert here("demo", "--out", "anywhere") == (
        2,
        "",
        "arctic: 'demo' is not a command but an extra that is not installed: pip install 'arctic-plugins[demo]'\n",
    )


def test_a_process_ends_with_the_status_and_the_line_of_its_error():
    result = arctic("trian", status=2)
    assert result.stdout == ""
    assert result.stderr == "arctic: 'trian' is not a command; did you mean 'train'?\n"


def test_traceback_on_request(here):
    status, _, error = here("train", "nowhere.yaml", "--traceback")
    assert status == 2
    assert "Traceback (most recent call last)" in error


def test_a_broken_plugin_is_listed_with_its_cause_and_harms_nothing_else(install_plugin):
    site = install_plugin("broken", "import a_module_that_is_not_there")
    result = arctic("plugins", "--json", PYTHONPATH=str(site))
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert "a_module_that_is_not_there" in rows["broken"]["error"]
    assert rows["fp8"]["error"] is None
    assert rows["fp8"]["slots"] == ["weight_codec"]
    assert "ok" in arctic("plugins").stdout


def test_a_broken_command_is_listed_and_harms_no_other(tmp_path):
    metadata = tmp_path / "bad-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[arctic_plugins.commands]\nbad = no_such_module:command\n")
    assert "(broken)" in arctic("--help", PYTHONPATH=str(tmp_path)).stdout
    result = arctic("bad", "anything", status=1, PYTHONPATH=str(tmp_path))
    assert result.stderr.count("\n") == 1
    assert "command 'bad' of bad cannot be imported" in result.stderr


def test_output_cut_off_by_its_reader_is_no_error():
    command = f"{sys.executable} -m arctic_plugins.cli plugins --json | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.stderr == ""


def test_time_to_help_is_reported(record_property):
    started = time.perf_counter()
    arctic("--help")
    record_property("seconds", time.perf_counter() - started)  # for the log; machines are too noisy to assert on it
