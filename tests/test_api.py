"""Plugins use nothing but what is public."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

from described import faces  # noqa: E402

PUBLIC = {module: set(importlib.import_module(module).__all__) for module in faces()}
"""Module -> its public names; the pages of the reference name the modules."""


PARENTS = ("plugins", "examples", "arctic_plugins/templates")


def imports_of(distribution):
    for path in distribution.rglob("*.py"):
        if "tests" not in path.parts[len(distribution.parts) :]:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("arctic_plugins"):
                    yield path, node


@pytest.mark.parametrize(
    "distribution",
    sorted(path for parent in PARENTS for path in (ROOT / parent).glob("*/")),
    ids=lambda path: path.name,
)
def test_plugins_use_what_is_public(distribution):
    own = [package.name for package in distribution.glob("arctic_*")]
    for path, node in imports_of(distribution):
        if node.module.partition(".")[0] not in own:
            assert node.module in PUBLIC, f"{path} imports {node.module}"
            assert {alias.name for alias in node.names} <= PUBLIC[node.module], f"{path}, line {node.lineno}"


def test_an_authors_plugin_of_before_still_imports_what_it_did():
    """The fixture plugin was written before there were faces."""
    from arctic_plugins.plugin import THIS_MACHINE

    assert THIS_MACHINE is importlib.import_module("arctic_plugins").THIS_MACHINE
