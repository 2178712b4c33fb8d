"""The reference, generated from the code: the directives and cross-references of :mod:`described`.

The directive ``public`` documents the public names of a module, ``fields`` the keys of a pydantic model,
``plugin-options`` the options of every plugin, ``commands`` the help of every command, and ``faces`` lists the modules
that ``public`` documents.

Docstrings refer to names where they are defined. A reference to one that is public leads to where it is documented; a
private one must exist, and is shown as text, like all names of other libraries.
"""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from described import (
    describe,
    describe_commands,
    describe_faces,
    describe_fields,
    describe_options,
    documented,
    faces,
    public_names,
)
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

LONGEST_SIGNATURE = 2000
"""In characters; only subclasses of ``TrainingArguments`` are longer."""


def _fields(target: str) -> Iterator[str]:
    """Yield the keys of the pydantic model ``module:name``."""
    module, _, name = target.partition(":")
    return describe_fields(getattr(importlib.import_module(module), name))


def _generated(write: Callable[..., Iterator[str]], arguments: int = 0) -> type[SphinxDirective]:
    """Return a directive whose content is what ``write`` yields for its arguments, in the markup of its page."""

    class Generated(SphinxDirective):
        required_arguments = arguments

        def run(self) -> list[nodes.Node]:
            return self.parse_text_to_nodes("\n".join(write(*self.arguments)), allow_section_headings=True)

    return Generated


DIRECTIVES = {
    "public": _generated(describe, 1),
    "fields": _generated(_fields, 1),
    "plugin-options": _generated(describe_options),
    "commands": _generated(describe_commands),
    "faces": _generated(describe_faces),
}


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
        homes |= {value.__module__ for value in public_names(face).values() if hasattr(value, "__module__")}
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
    for name, directive in DIRECTIVES.items():
        app.add_directive(name, directive)
    app.connect("missing-reference", resolve)
    app.connect("doctree-read", _mend)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _plain_attributes, priority=100)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
