"""What is public is documented, and plugins use nothing else."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text()
PUBLIC = {
    section: set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    for section, text in re.findall(r"^### `([\w.]+)`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
}
"""Module -> its public names, as the page lists them."""


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_the_page_lists_what_a_module_exports(module):
    assert PUBLIC[module] == set(importlib.import_module(module).__all__)


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_every_public_name_has_a_docstring(module):
    package = importlib.import_module(module)
    for name in package.__all__:
        found = getattr(package, name)
        if inspect.isclass(found) or inspect.isroutine(found):
            assert (found.__doc__ or "").strip(), name


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
