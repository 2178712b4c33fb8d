"""What there is to describe: public names, options, keys and commands, as text from the code. Imports no Sphinx.

:mod:`reference` makes the pages of it, and ``tests/test_reference.py`` fails for what has no description.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from arctic_plugins.cli import arctic
from arctic_plugins.cli.plugins import _kind
from arctic_plugins.discovery import load_plugin
from arctic_plugins.registry import FIRST_PARTY

PAGES = Path(__file__).parents[1] / "reference"


@functools.cache
def faces() -> dict[str, str]:
    """Return the public modules -> the page that documents each, as the pages' ``public`` directives name them."""
    texts = {path.stem: path.read_text() for path in sorted(PAGES.glob("*.md"))}
    found = ((page, re.findall(r"^\.\. public:: ([\w.]+)$", text, re.MULTILINE)) for page, text in texts.items())
    return {module: page for page, modules in found for module in modules}


def public_names(module: str) -> dict[str, object]:
    """Return what ``module`` exports, by name."""
    package = importlib.import_module(module)
    return {name: getattr(package, name) for name in package.__all__}


@functools.cache
def documented() -> dict[int, str]:
    """Return the identity of each public class and function -> where it is documented: its shortest public name."""
    found: dict[int, str] = {}
    for module in sorted(faces(), key=lambda name: (name.count("."), name)):
        for name, value in public_names(module).items():
            if inspect.isclass(value) or inspect.isroutine(value):
                found.setdefault(id(value), f"{module}.{name}")
    return found


def attribute_docs(body: list[ast.stmt]) -> dict[str, str]:
    """Return the names that the statements assign to -> the strings under them; "" for those without one."""
    found = {}
    for statement, after in itertools.pairwise([*body, ast.Pass()]):
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            has_one = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = inspect.cleandoc(str(after.value.value)) if has_one else ""
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found.update({each.id: text for each in targets if isinstance(each, ast.Name)})
    return found


def constant_doc(module: str, name: str) -> str:
    """Return the string under the constant ``name`` that ``module`` exports, where it is defined; "" without one."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    if name in (own := attribute_docs(tree.body)):
        return own[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return constant_doc(node.module, name)
    return ""


def describe(module: str) -> Iterator[str]:
    """Yield the documentation of a public module in reStructuredText, name by name in the order of ``__all__``."""
    text = inspect.cleandoc(importlib.import_module(module).__doc__ or "")
    yield from (f".. py:module:: {module}", "", *text.splitlines(), "")
    homes = {name: documented().get(id(value)) for name, value in public_names(module).items()}
    elsewhere = [home for name, home in homes.items() if home not in (None, f"{module}.{name}")]
    if elsewhere:
        yield from ("Also exported here: " + ", ".join(f":py:obj:`~{home}`" for home in elsewhere) + ".", "")
    for name, value in public_names(module).items():
        where = f"{module}.{name}"
        if homes[name] is None:
            yield from (f".. py:data:: {name}", f"   :module: {module}", "")
            yield from (f"   {line}" for line in (*constant_doc(module, name).splitlines(), ""))
        elif homes[name] != where:
            continue
        elif inspect.isclass(value):
            kind = "exception" if issubclass(value, BaseException) else "class"
            options = ["members:", "undoc-members:", "exclude-members: model_config"]
            if value.__bases__ != (object,):
                options.append("show-inheritance:")
            yield from (f".. auto{kind}:: {where}", *(f"   :{option}" for option in options), "")
        else:
            yield from (f".. autofunction:: {where}", "")


def describe_fields(model: type[BaseModel]) -> Iterator[str]:
    """Yield a definition list in Markdown: the keys of a pydantic model, with type, default and meaning."""
    properties = model.model_json_schema(by_alias=False)["properties"]
    for name, field in model.model_fields.items():
        value = to_jsonable_python(field.get_default(call_default_factory=True)) if not field.is_required() else None
        default = "required" if field.is_required() else f"default `{json.dumps(value)}`"
        yield from (f"`{name}`", f": *{_kind(properties[name])}; {default}*", "")
        for paragraph in inspect.cleandoc(field.description or "").split("\n\n"):
            yield from (f"  {' '.join(paragraph.split())}".replace("``", "`"), "")


def describe_options() -> Iterator[str]:
    """Yield the options of all plugins of this project, in Markdown."""
    for name in sorted(FIRST_PARTY):
        plugin = load_plugin(name)
        meaning = " ".join((inspect.getdoc(plugin) or "").partition("\n\n")[0].split()).replace("``", "`")
        slots = ", ".join(f"`{slot}`" for slot in sorted(plugin.slots)) or "none"
        about = f"Slots: {slots}. [About this plugin](../../plugins/{name}/README.md)"
        yield from (f"## `{name}`", "", meaning, "", about, "", *describe_fields(plugin.config))


def describe_commands() -> Iterator[str]:
    """Yield what every command prints as its help, in Markdown.

    Raises:
        RuntimeError: a command cannot be imported.
    """
    for name in ("", *_commands(arctic)):
        found = CliRunner().invoke(arctic, [*name.split(), "--help"], prog_name="arctic", terminal_width=90)
        if found.exit_code or "(broken)" in found.output:
            raise RuntimeError(f"arctic {name} --help: {found.output}")
        yield from (f"## `{f'arctic {name}'.strip()}`", "", "```text", found.output.rstrip(), "```", "")


def _commands(group: click.Group) -> Iterator[str]:
    """Yield the names of the commands in ``group``, after each group those of its own."""
    for name in group.list_commands(click.Context(group)):
        yield name
        if isinstance(command := group.get_command(click.Context(group), name), click.Group):
            yield from (f"{name} {inner}" for inner in _commands(command))


def describe_faces() -> Iterator[str]:
    """Yield a table of the public modules, in Markdown."""
    yield from ("| module | contents |", "|---|---|")
    for module, page in sorted(faces().items()):
        summary = (importlib.import_module(module).__doc__ or "").partition("\n\n")[0]
        summary = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join(summary.split())).replace("``", "`")
        yield f"| [`{module}`](reference/{page}.md) | {summary} |"
