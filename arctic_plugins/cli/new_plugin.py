"""``arctic new-plugin``: the package of a new plugin, copied from a template that works.

A template is a directory of plain files whose plugin is called ``acme``. Those in ``common`` belong to every kind; if a
kind has a file of the same name, its text follows.
"""

from __future__ import annotations

import keyword
import os
import re
import tempfile
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import click

from arctic_plugins.cli import COMMAND_GROUP
from arctic_plugins.errors import ConfigError, UserError

__all__ = ["KINDS", "new_plugin"]

TEMPLATES = Path(__file__).parents[1] / "templates"
KINDS = {
    "codec": "a format for frozen weights",
    "placement": "a place for frozen weights",
    "model": "an architecture that the hosts lack",
    "rope": "a RoPE type",
    "trainer": "a mixin for the Trainer",
    "loss": "a way to compute the loss",
    "dispatch": "a way to spread the experts of a mixture",
    "command": "a command of arctic",
}
"""Kind of plugin -> what its template adds."""


@click.command("new-plugin", short_help="Create the package of a new plugin.")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(list(KINDS)),
    required=True,
    help=f"What it adds: {'; '.join(f'{kind}, {meaning}' for kind, meaning in KINDS.items())}.",
)
def new_plugin(name: str, kind: str) -> None:
    """Create the directory NAME with a package that works: a plugin called NAME, its tests, a README and a CI file.

    NAME consists of lowercase letters and digits, in words joined by '-' or '_'.

    \b
    Example:
      arctic new-plugin int4 --kind codec
    """
    directory = Path(name)
    texts = _texts(kind)
    words = _names(name, "\n".join(texts.values()))
    if os.path.lexists(directory):
        raise ConfigError(f"{directory.absolute()} exists already", fix="choose another name, or work elsewhere")
    try:
        with tempfile.TemporaryDirectory(dir=".", prefix=".new-plugin-") as scratch:  # renamed once it is complete
            for path, text in texts.items():
                target = Path(scratch) / name / _renamed(path, words)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(_renamed(text, words), encoding="utf-8")
            (Path(scratch) / name).rename(directory)
    except OSError as error:
        raise UserError(f"{directory.absolute()} cannot be written: {error.strerror}", fix="work elsewhere") from error
    click.echo(
        f"{directory}/ contains the plugin '{name}', which works as it is. Next:\n"
        f"  pip install --no-build-isolation -e {name}\n"
        f"  arctic plugins {name}\n"
        f"  pytest {name}\n"
        f"and then change {directory / words['arctic_acme']}"
    )


def _texts(kind: str) -> dict[str, str]:
    """Return path -> text of the files of a template."""
    found: dict[str, str] = {}
    for root in (TEMPLATES / "common", TEMPLATES / kind):
        for path in sorted(root.rglob("*")):
            where = path.relative_to(root).as_posix()
            if path.is_file() and "cache" not in where:  # those of Python and of linters
                found[where] = found.get(where, "") + path.read_text(encoding="utf-8")
    return found


def _names(name: str, text: str) -> dict[str, str]:
    """Return placeholder -> its replacement, after checking that ``name`` is free and fits into the template's text."""
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        raise ConfigError(
            f"'{name}' cannot be the name of a plugin",
            expected="lowercase letters and digits, in words joined by '-' or '_'",
            fix="choose another name",
        )
    words = re.split("[-_]", name)
    package, class_name = f"arctic_{'_'.join(words)}", "".join(word.capitalize() for word in words)
    from arctic_plugins.registry import FIRST_PARTY

    installed = entry_points(group="arctic_plugins").names
    if package.startswith("arctic_plugins") or name in FIRST_PARTY - installed:
        raise ConfigError(f"'{name}' is the name of a plugin of arctic-plugins", fix="choose another name")
    for group, what in (("arctic_plugins", "plugin"), (COMMAND_GROUP, "command")):
        for point in entry_points(group=group, name=name):
            owner = point.dist.name if point.dist else "an unknown distribution"
            raise ConfigError(f"{what} '{name}' is installed already, by {owner}", fix="choose another name")
    if find_spec(package) is not None:
        raise ConfigError(f"the package {package} is installed already", fix="choose another name")
    if keyword.iskeyword(class_name) or re.search(rf"\b{class_name}", text.replace("Acme", "_")):
        raise ConfigError(
            f"the class would be called {class_name}, which means something else", fix="choose another name"
        )
    return {"arctic_acme": package, "arctic-acme": package.replace("_", "-"), "Acme": class_name, "acme": name}


def _renamed(text: str, words: dict[str, str]) -> str:
    """Replace the placeholders, longer ones first: ``acme`` alone is the plugin's name, and occurs only as such."""
    return re.sub("|".join(words), lambda found: words[found[0]], text)
