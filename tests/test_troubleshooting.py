"""Each message in docs/troubleshooting.md is one that is really printed."""

import ast
import importlib.metadata
import importlib.util
import re
import socket
from contextlib import closing
from pathlib import Path

import pytest
import torch

from arctic_plugins import Stack
from arctic_plugins.cli import main
from arctic_plugins.errors import UserError
from arctic_plugins.frozen import ModuleCodecs

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
HEADLINES = re.findall(r"^### `(.+)`(?: \((\S+)\))?$", PAGE, re.MULTILINE)
"""Messages, with ``…`` for what varies, and the library or program that prints them, if it is not this project."""
OURS = [message for message, owner in HEADLINES if not owner]
THEIRS = [(message, owner) for message, owner in HEADLINES if owner]


def template(node):
    """Return the text of an expression with ``…`` for whatever is not constant."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdr]|%\.\d+f", "…", node.value)  # of logging
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "…"


def templates(path):
    """Yield the text of each string in a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            yield template(node)


def normal(message):
    return re.sub(r"[…\s]*…[…\s]*", "…", message)


@pytest.fixture(scope="module")
def printed():
    packages = [ROOT / "arctic_plugins", *ROOT.glob("integrations/*/arctic_*"), *ROOT.glob("plugins/*/arctic_*")]
    modules = (path for package in packages for path in package.rglob("*.py") if "testing" not in path.parts)
    return {normal(text) for path in modules for text in templates(path)}


def test_there_are_no_headings_of_another_form():
    assert len(HEADLINES) == len(re.findall("^### ", PAGE, re.MULTILINE)) == len(set(HEADLINES)) >= 25


@pytest.mark.parametrize("message", OURS)
def test_the_source_has_the_message(printed, message):
    assert normal(message) in printed


SOURCES = {
    "Failed to load CPU": ("bitsandbytes", "backends/cpu/ops.py"),
    "Unknown quantization type": ("transformers", "quantizers/auto.py"),
    "Your setup": ("transformers", "training_args.py"),
    "Unknown quantization method": ("vllm", "config/model.py"),
    "To serve": ("vllm", "v1/core/kv_cache_utils.py"),
    "No available memory": ("vllm", "v1/core/kv_cache_utils.py"),
    "Available memory": ("vllm", "v1/worker/cpu_worker.py"),
    "Engine core": ("vllm", "v1/engine/utils.py"),
}
"""The beginning of a message -> the package and the module that has it."""


def unknown_operator():
    torch.library.register_fake("torchvision::nms")(lambda boxes, scores, iou_threshold: None)


def port_in_use():
    with closing(socket.create_server(("127.0.0.1", 0))) as first:
        socket.create_server(first.getsockname())


PROVOKED = {
    "torch": {
        "operator torchvision::nms does not exist": unknown_operator,
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate … bytes": lambda: torch.empty(2**60),
    },
    "importlib.metadata": {
        "No package metadata was found for …": lambda: importlib.metadata.version("arctic-plugins-of-nobody")
    },
    "Python": {"Address already in use": port_in_use},
}
"""Messages of other programs that can be had here: how."""


def pattern(message):
    return ".*".join(re.escape(part) for part in message.split("…"))


@pytest.mark.parametrize(("message", "owner"), THEIRS)
def test_messages_of_other_programs(message, owner):
    if owner in PROVOKED:
        with pytest.raises(Exception, match=pattern(message)):
            PROVOKED[owner][message]()
        return
    package, module = next(source for start, source in SOURCES.items() if message.startswith(start))
    if (found := importlib.util.find_spec(package)) is None:
        pytest.skip(f"{package} is not installed")
    path = Path(found.submodule_search_locations[0]) / module
    assert any(re.match(pattern(normal(message)), normal(text)) for text in templates(path))


ERRORS = {
    "plugin '…' is not installed": lambda: Stack.from_dict({"fp9": {}}),
    "… is not an option": lambda: Stack.from_dict({"fp8": {"bit": 8}}),
    "quantization_config has format …": lambda: ModuleCodecs.from_config(
        {"quant_method": "arctic", "format": 99, "codecs": {}, "modules": {}}
    ),
    "plugins.….… is … with … process…": lambda: Stack.from_dict({"moe": {"expert_parallel": 2}}).validate(None, "cpu"),
}
"""Errors that are quick to provoke; tests/test_bad_input.py provokes most of the others."""


@pytest.mark.parametrize("message", ERRORS)
def test_the_message_is_that_of_the_error(message):
    assert message in OURS
    with pytest.raises(UserError, match=f"^{pattern(message)}"):
        ERRORS[message]()


COMMANDS = {
    "'…' is neither a local directory nor in the Hub's cache, and …": ["generate", "nobody/nothing", "hi"],
    "found … in place of CHECKPOINT": ["serve", "--port", "8001"],
    "… is not valid YAML: …": ["train", "bad.yaml"],
}


@pytest.mark.parametrize("message", COMMANDS)
def test_the_message_is_that_of_the_command(message, tmp_path, monkeypatch, capsys):
    assert message in OURS
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "bad.yaml").write_text("model: [\n")
    with pytest.raises(SystemExit, match="2"):
        main(COMMANDS[message])
    assert re.match(f"arctic: {pattern(message)}", capsys.readouterr().err.splitlines()[-1])
