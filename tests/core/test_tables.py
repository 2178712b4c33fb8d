"""What the command line lists fits a terminal of 80 columns, and cuts no name."""

import json

import pytest

from arctic_plugins import Finding
from arctic_plugins.cli import main
from arctic_plugins.discovery import installed_plugins, load_plugin

OURS = [
    name for name, providers in installed_plugins().items() if providers[0].distribution.startswith("arctic-plugins-")
]


@pytest.fixture
def arctic(capsys, monkeypatch):
    """A function that runs the command in this process and gives (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        with pytest.raises(SystemExit) as raised:
            main(list(arguments))
        return raised.value.code, *capsys.readouterr()

    return run


def test_the_command_alone_prints_its_help(arctic):
    alone, asked = arctic(), arctic("--help")
    assert alone == asked
    assert (alone[0], alone[2]) == (0, "")
    assert "Usage: arctic" in alone[1]


def test_a_plugin_is_a_line(arctic, install_plugin):
    install_plugin("broken", "import a_module_that_is_not_there")
    status, output, _ = arctic("plugins")
    lines = {line.split()[0]: line for line in output.split("\n\n")[0].splitlines()}
    assert status == 0
    assert lines.keys() == installed_plugins().keys()
    assert lines["moe"].split() == [
        "moe",
        "arctic-plugins-moe",
        installed_plugins()["moe"][0].version,
        "ok",
        "experts_dispatch",
    ]
    assert "a_module_that_is_not_there" in lines["broken"]
    assert all(len(line) <= 80 for name, line in lines.items() if name != "broken")


@pytest.mark.parametrize("name", OURS)
def test_every_option_is_there_with_its_meaning_and_default(arctic, name):
    status, output, _ = arctic("plugins", name, "--json")
    options = {option["name"]: option for option in json.loads(output)["options"]}
    assert status == 0
    assert list(options) == list(load_plugin(name).config.model_fields)
    assert all(option["meaning"] and option["type"] for option in options.values())
    text = arctic("plugins", name)[1]
    assert all(f"\n  {option}: " in text for option in options)
    assert all(len(line) <= 80 for line in text.splitlines())


def test_types_and_defaults_are_words(arctic):
    text = arctic("plugins", "fp8")[1]
    assert "  bits: 6 or 8 or 12; default 8\n      Bits per weight: 8 is e4m3, 6 is e3m2, 12 is e4m7.\n" in text
    assert '  group_size: "channel" or integer >= 32, <= 512; default "channel"\n' in text
    assert "  type: string; required\n" in arctic("plugins", "rope")[1]


def test_a_plugin_that_is_not_there(arctic):
    status, _, error = arctic("plugins", "fp9")
    assert status == 2
    assert "did you mean 'fp8'" in error


def test_findings_fit(arctic, monkeypatch):
    findings = [
        Finding(
            "ok",
            "versions",
            ", ".join(f"arctic-plugins-{name}" for name in ("fp8", "longseq", "lora", "moe", "offload", "rope")),
        ),
        Finding("warning", "plugin fp8: kernels", "CPU: reference in torch", "install g++"),
    ]
    monkeypatch.setattr("arctic_plugins.diagnosis.diagnose", lambda recipe: findings)
    status, output, _ = arctic("doctor")
    lines = [line.rstrip() for line in output.splitlines()]
    assert status == 0
    assert all(len(line) <= 80 for line in lines)
    assert "warning  plugin fp8: kernels  CPU: reference in torch" in lines
    assert [line.strip() for line in lines if "to do" in line] == ["to do: install g++"]
    assert all(name in output for name in ("arctic-plugins-longseq,", "arctic-plugins-offload,"))
