"""The reference, generated from the code.

The directives: ``public`` documents the public names of a module, ``fields`` the keys of a pydantic model,
``plugin-options`` the options of every plugin, ``commands`` the help of every command, and ``faces`` lists the modules
that ``public`` documents.

Docstrings refer to names where they are defined. A reference to one that is public leads to where it is documented; a
private one must exist, and is shown as text, like all names of other libraries.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner
from docutils import nodes
from pydantic import BaseModel
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from arctic_plugins.cli import arctic
from arctic_plugins.cli.plugins import options_of
from arctic_plugins.discovery import load_plugin
from arctic_plugins.registry import FIRST_PARTY

LONGEST_SIGNATURE = 2000
"""In characters; only subclasses of ``TrainingArguments`` are longer."""
PAGES = Path(__file__).parents[1] / "reference"


def faces() -> dict[str, str]:
    """Return the public modules -> the page that documents each, as the pages' ``public`` directives name them."""
    texts = {path.stem: path.read_text() for path in sorted(PAGES.glob("*.md"))}
    found = ((page, re.findall(r"^\.\. public:: ([\w.]+)$", text, re.MULTILINE)) for page, text in texts.items())
    return {module: page for page, modules in found for module in modules}


def public_names(module: str) -> list[str]:
    """Return what ``module`` exports."""
    return list(importlib.import_module(module).__all__)


@functools.cache
def documented() -> dict[int, str]:
    """Return the identity of each public class and function -> where it is documented: its shortest public name."""
    found: dict[int, str] = {}
    for module in sorted(faces(), key=lambda name: (name.count("."), name)):
        for name in public_names(module):
            value = getattr(importlib.import_module(module), name)
            if inspect.isclass(value) or inspect.isroutine(value):
                found.setdefault(id(value), f"{module}.{name}")
    return found


def attribute_docs(module: str) -> dict[str, str]:
    """Return the module's constants -> the strings under them."""
    body = ast.parse(inspect.getsource(importlib.import_module(module))).body
    found = {}
    for statement, after in itertools.pairwise(body):
        targets = getattr(statement, "targets", None) or [
            getattr(statement, "target", getattr(statement, "name", None))
        ]
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            found.update({each.id: after.value.value for each in targets if isinstance(each, ast.Name)})
    return found


def constant_doc(module: str, name: str) -> str:
    """Return the string under the constant ``name`` that ``module`` exports, or "", looked up where it is defined."""
    if name in (own := attribute_docs(module)):
        return inspect.cleandoc(own[name])
    for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))):
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return constant_doc(node.module, name)
    return ""


def describe(module: str) -> Iterator[str]:
    """Yield the documentation of a public module in reStructuredText, name by name in the order of ``__all__``."""
    package = importlib.import_module(module)
    yield from (f".. py:module:: {module}", "", *inspect.cleandoc(package.__doc__ or "").splitlines(), "")
    names = {name: getattr(package, name) for name in public_names(module)}
    elsewhere = [
        where for name, value in names.items() if (where := documented().get(id(value), "")) != f"{module}.{name}"
    ]
    if any(elsewhere):
        yield from ("Also exported here: " + ", ".join(f":py:obj:`~{where}`" for where in elsewhere if where) + ".", "")
    for name, value in names.items():
        where = f"{module}.{name}"
        if id(value) not in documented():
            yield from (f".. py:data:: {name}", f"   :module: {module}", "")
            yield from (f"   {line}" for line in (*constant_doc(module, name).splitlines(), ""))
        elif documented()[id(value)] != where:
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
    for option in options_of(model):
        default = "required" if option["required"] else f"default `{json.dumps(option['default'])}`"
        yield from (f"`{option['name']}`", f": *{option['type']}; {default}*", "")
        for paragraph in inspect.cleandoc(model.model_fields[option["name"]].description or "").split("\n\n"):
            yield from (f"  {' '.join(paragraph.split())}".replace("``", "`"), "")


def describe_options() -> Iterator[str]:
    """Yield the options of all plugins of this project, in Markdown."""
    for name in sorted(FIRST_PARTY):
        plugin = load_plugin(name)
        meaning = " ".join((inspect.getdoc(plugin) or "").partition("\n\n")[0].split()).replace("``", "`")
        slots = ", ".join(f"`{slot}`" for slot in sorted(plugin.slots)) or "none"
        yield from (
            f"## `{name}`",
            "",
            meaning,
            "",
            f"Slots: {slots}. [About this plugin](../../plugins/{name}/README.md)",
        )
        yield from ("", *describe_fields(plugin.config))


def describe_commands() -> Iterator[str]:
    """Yield what every command prints as its help, in Markdown."""
    for name in ("", *arctic.list_commands(click.Context(arctic))):
        found = CliRunner().invoke(arctic, [*name.split(), "--help"], prog_name="arctic", terminal_width=90)
        if found.exit_code or "(broken)" in found.output:
            raise ExtensionError(f"arctic {name} --help: {found.output}")
        yield from (f"## `{f'arctic {name}'.strip()}`", "", "```text", found.output.rstrip(), "```", "")


class _Generated(SphinxDirective):
    required_arguments = 0

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(__file__)
        return self.parse_text_to_nodes("\n".join(self.lines()), allow_section_headings=True)

    def lines(self) -> Iterator[str]:
        raise NotImplementedError


class Public(_Generated):
    """The public names of a module."""

    required_arguments = 1

    def lines(self) -> Iterator[str]:
        return describe(self.arguments[0])


class Fields(_Generated):
    """The keys of a pydantic model, ``module:name``."""

    required_arguments = 1

    def lines(self) -> Iterator[str]:
        module, _, name = self.arguments[0].partition(":")
        return describe_fields(getattr(importlib.import_module(module), name))


class PluginOptions(_Generated):
    """The options of every plugin."""

    def lines(self) -> Iterator[str]:
        return describe_options()


class Commands(_Generated):
    """The help of every command."""

    def lines(self) -> Iterator[str]:
        return describe_commands()


class Faces(_Generated):
    """A table of the public modules."""

    def lines(self) -> Iterator[str]:
        yield from ("| module | contents |", "|---|---|")
        for module, page in sorted(faces().items()):
            summary = (importlib.import_module(module).__doc__ or "").partition("\n\n")[0]
            summary = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join(summary.split())).replace("``", "`")
            yield f"| [`{module}`](reference/{page}.md) | {summary} |"


def locate(name: str) -> tuple[Any, list[str]] | None:
    """Import the longest part of a dotted name that is a module, and return it and the attributes that follow."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        value: Any = found
        for part in parts[end:]:
            if part in getattr(value, "__annotations__", {}) or part in getattr(value, "model_fields", {}):
                value = None
            elif not hasattr(value, part):
                return None
            else:
                value = getattr(value, part)
        return found, parts[end:]
    return None


def _public_name(name: str) -> str | None:
    """Return where the class, function or attribute is documented, or None if it is private."""
    found = locate(name)
    if found is None:
        return None
    value, attributes = found
    for position, part in enumerate(attributes):
        value = getattr(value, part, None)
        if where := documented().get(id(value)):
            return ".".join([where, *attributes[position + 1 :]])
    return None


def _names_meant(node: pending_xref) -> Iterator[str]:
    """Yield the existing names that a reference may mean where its docstring is written: in a module behind a face."""
    target, face = node["reftarget"], node.get("py:module")
    homes = {face, f"{face}.{node.get('py:class')}", "builtins"} if face else {"builtins"}
    if face in faces():
        values = (getattr(importlib.import_module(face), name) for name in public_names(face))
        homes |= {value.__module__ for value in values if hasattr(value, "__module__")}
    yield from filter(locate, [target, *(f"{home}.{target}" for home in sorted(homes))])


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> nodes.Element | None:
    """Resolve a reference to a Python name that is not documented under this name."""
    if node.get("refdomain") != "py":
        return None
    objects = env.domains.python_domain.objects
    names = list(_names_meant(node))
    for public in filter(None, map(_public_name, names)):
        if public in objects:
            entry = objects[public]
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, public)
    return contnode if names or _is_annotation(node) else None


def _is_annotation(node: pending_xref) -> bool:
    """Return whether the reference is the type of a parameter: its name may be one that only type checkers import."""
    return not node.hasattr("refexplicit")


def _mend(_app: Sphinx, doctree: nodes.document) -> None:
    """Keep Sphinx from taking ``type`` in an annotation for some class's attribute ``type``, and write dashes."""
    for node in list(doctree.findall(pending_xref)):
        if node.get("refdomain") == "py" and _is_annotation(node) and hasattr(builtins, node["reftarget"]):
            node.replace_self(node.children)
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":  # between a parameter and its meaning; smartquotes would also change options
            text.parent.replace(text, nodes.Text(" \N{EN DASH} "))


def _plain_attributes(_app: Sphinx, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking the start of an attribute's text, up to a colon, for its type."""
    if lines and what in ("attribute", "property"):
        lines[:0] = ["..", ""]


def _signature(
    _app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Shorten a signature that is mostly another library's, and write factories of defaults as Python."""
    if signature and len(signature) > LONGEST_SIGNATURE:
        return "(...)", returns
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives and the resolver."""
    directives = {
        "public": Public,
        "fields": Fields,
        "plugin-options": PluginOptions,
        "commands": Commands,
        "faces": Faces,
    }
    for name, directive in directives.items():
        app.add_directive(name, directive)
    app.connect("missing-reference", resolve)
    app.connect("doctree-read", _mend)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _plain_attributes, priority=100)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
