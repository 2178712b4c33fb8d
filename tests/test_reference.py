"""The reference that `make docs` generates leaves nothing out: whatever is public has a description."""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import textwrap
from pathlib import Path

import pytest
from arctic_plugins_huggingface.training.recipe import DataConfig, DataSource, Recipe
from pydantic import BaseModel

from arctic_plugins.discovery import load_plugin, process_registry
from arctic_plugins.registry import FIRST_PARTY

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS / "diagrams")]

import draw  # noqa: E402
import offline  # noqa: E402
from described import attribute_docs, constant_doc, describe_commands, faces, public_names  # noqa: E402

AS_ELSEWHERE = {
    "AdapterConfig": "its fields are PEFT's",
    "AnyAdapterConfig": "its fields are PEFT's",
    "TracedGpu": "its methods are those of Gpu",
}
"""Classes whose members are described where they come from."""


def assigned_and_defined(kind):
    """The names in the body of a class -> their descriptions."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    functions = {node.name: ast.get_docstring(node) for node in body if isinstance(node, ast.FunctionDef)}
    return {**attribute_docs(body), **functions}


def inherits(kind, name):
    return any(name in vars(base) or name in vars(base).get("__annotations__", {}) for base in kind.__mro__[1:])


@pytest.mark.parametrize("module", sorted(faces()))
def test_every_public_name_is_described(module):
    for name, value in public_names(module).items():
        if inspect.isclass(value) or inspect.isroutine(value):
            assert (value.__doc__ or "").strip(), name
        else:
            assert constant_doc(module, name), f"{name} has no string under it"


@pytest.mark.parametrize("module", sorted(faces()))
def test_every_member_of_a_public_class_is_described(module):
    for kind in filter(inspect.isclass, public_names(module).values()):
        if kind.__name__ not in AS_ELSEWHERE:
            for name, text in assigned_and_defined(kind).items():
                obvious = name.startswith(("_", "test_")) or inherits(kind, name)  # the name of a law says it all
                assert text or obvious, f"{kind.__name__}.{name}"


@pytest.mark.parametrize("module", sorted(faces()))
def test_no_public_name_is_that_of_a_module(module):
    """The package would export one or the other, depending on what was imported before."""
    if hasattr(importlib.import_module(module), "__path__"):
        assert not [name for name in public_names(module) if importlib.util.find_spec(f"{module}.{name}")]


@pytest.mark.parametrize("model", [*(load_plugin(name).config for name in sorted(FIRST_PARTY)), Recipe, DataConfig])
def test_every_option_is_described(model: type[BaseModel]):
    assert all(field.description for field in model.model_fields.values())


def test_keys_of_a_source_are_described():
    assert DataSource.model_fields.keys() <= DataConfig.model_fields.keys() | {"weight"}
    assert DataSource.model_fields["weight"].description


def test_every_command_is_in_the_reference(distributions):
    points = [about["project"].get("entry-points", {}) for about in distributions.values()]
    declared = {name for groups in points for name in groups.get("arctic_plugins.commands", {})}
    assert declared <= set(re.findall(r"^## `arctic ([\w-]+)`$", "\n".join(describe_commands()), re.MULTILINE))


def test_every_variable_is_in_the_reference(distributions):
    """Each is a constant of its own somewhere, and nothing else looks like one."""
    page = (DOCS / "reference" / "environment.md").read_text()
    packages = [marker.parent for folder in distributions for marker in folder.glob("*/py.typed")]
    sources = [path.read_text() for package in packages for path in package.rglob("*.py")]
    found = {name for source in sources for name in re.findall(r'"(ARCTIC_[A-Z_]+)"', source)}
    assert found == set(re.findall(r"^\| `(ARCTIC_[A-Z_]+)` \|", page, re.MULTILINE))


@pytest.mark.parametrize("type_name", process_registry().codec_types())
def test_what_codecs_write_is_in_the_checkpoint_format(type_name):
    page = (DOCS / "checkpoint-format.md").read_text()
    codec = process_registry().load_codec(type_name)()
    assert all(f".weight{suffix}`" in page for suffix in codec.layout((64, 128)))


def test_diagrams_are_as_drawn():
    for path, content in draw.diagrams():
        assert path.read_text() == content, f"run python {Path(draw.__file__).relative_to(ROOT)}"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('<script src="https://cdn.example/x.js"></script>', 1),
        ('<link rel="stylesheet" href="//fonts.example/x.css" />', 1),
        ("@font-face { src: url(https://fonts.example/x.woff2) }", 1),
        ('<img alt="a" src="http://shields.example/badge.svg">', 1),
        ('<a href="https://example.com">a link</a> <script src="_static/x.js"></script>', 0),
        ('<link rel="canonical" href="https://example.com"><img src="data:image/png;base64,//8=">', 0),
    ],
)
def test_what_comes_from_another_server_is_found(text, count):
    assert len(offline.loaded_from_elsewhere(text)) == count
