"""The JSON schema of a recipe accepts what the loader accepts, and refuses what it refuses key by key."""

import contextlib
import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from arctic_plugins_huggingface.cli.schema import schema as command
from arctic_plugins_huggingface.training import check
from arctic_plugins_huggingface.training.recipe import Recipe
from arctic_plugins_huggingface.training.schema import recipe_schema
from arctic_plugins_huggingface.training.trainers import TRAINERS
from pydantic import ValidationError

from arctic_plugins import UserError
from arctic_plugins.discovery import installed_plugins, load_plugin
from arctic_plugins.errors import ConfigError
from arctic_plugins.testing import run_python

ROOT = Path(__file__).parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*/*/README.md"))]
BLOCKS = [block for path in DOCUMENTS for block in re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.M | re.S)]
WRITTEN = {
    **{path.name: yaml.safe_load(path.read_text()) for path in sorted(ROOT.glob("examples/**/*.yaml"))},
    **{
        f"document {at}": yaml.safe_load(block) for at, block in enumerate(BLOCKS) if re.search(r"^model:", block, re.M)
    },
}
"""The recipes of examples and documents."""
SMALL = {
    "model": "someone/model",
    "plugins": {"lora": {}},
    "data": {"path": "train.jsonl"},
    "training": {"output_dir": "out"},
}


def changed(**changes):
    """A small recipe with other values; a key such as ``data__format`` is one under ``data``, ... takes it away."""
    recipe = copy.deepcopy(SMALL)
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        if value is ...:
            del place[key]
        else:
            place[key] = value
    return recipe


GOOD = {
    "small": changed(),
    "no plugins": changed(plugins=None),
    "a plugin with nothing below it": changed(plugins__lora=None, plugins__fp8=None),
    "empty sections": changed(plugins=None, load=None, nonfinite=None, task=None),
    "options": changed(
        plugins__fp8={"bits": 6, "group_size": 64, "formats": {"**.down_proj": {"bits": 8}}},
        plugins__offload={"budget": "60GiB", "select": "in_order", "prefetch": 4},
        plugins__lora={"r": 8, "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "bytes as a number": changed(plugins__fp8={}, plugins__offload={"budget": 1000}),
    "load": changed(load={"attn_implementation": "eager", "dtype": "float32", "anything": {"a": 1}}),
    "sources": changed(
        data__path=None, data__sources=[{"path": "a.jsonl", "weight": 2}, {"path": "b.csv", "weight": 1}]
    ),
    "evaluation": changed(data__eval_size=0.5, training__eval_steps=10),
    "many rows": changed(data__eval_size=100),
    "dpo": changed(data__format="preference", training__trainer="dpo", training__beta=0.2, training__loss_type=["ipo"]),
    "reward": changed(data__format="preference", training__trainer="reward"),
    "classifier": changed(task="text-classification", data__labels=["a", "b"]),
    "deepspeed's own settings": changed(plugins={"deepspeed": {}}, training__deepspeed={"zero": 1}),
    "a list or a word": changed(training__report_to=["tensorboard"], training__optim_target_modules="all-linear"),
}
BAD = {
    "an unknown key": changed(extra=1),
    "no model": changed(model=...),
    "no data": changed(data=...),
    "empty data": changed(data=None),
    "no training": changed(training=...),
    "empty training": changed(training=None),
    "no output_dir": changed(training={"max_steps": 1}),
    "an empty output_dir": changed(training__output_dir=""),
    "a list of plugins": changed(plugins=["lora"]),
    "a plugin that is not installed": changed(plugins__lroa={}),
    "an unknown option": changed(plugins__lora={"rank": 8}),
    "an option's option": changed(plugins__fp8={"formats": {"**": {"bit": 8}}}),
    "an option of the wrong type": changed(plugins__lora={"r": "many"}),
    "an option out of range": changed(plugins__lora={"r": 0}),
    "another choice": changed(plugins__fp8={"bits": 7}),
    "options that are a number": changed(plugins__lora=8),
    "a list under load": changed(load=["eager"]),
    "what a recipe cannot load": changed(load={"auto_class": "AutoModel"}),
    "an unknown key of data": changed(data__colums={}),
    "an unknown format": changed(data__format="alpacca"),
    "neither path nor sources": changed(data={"format": "alpaca"}),
    "path and sources": changed(data__sources=[{"path": "a.jsonl"}]),
    "no sources": changed(data={"sources": []}),
    "a source without path": changed(data={"sources": [{"format": "alpaca"}]}),
    "a fraction of all rows": changed(data__eval_size=1.5),
    "an unknown argument": changed(training__max_step=1),
    "an argument of another trainer": changed(training__trainer="sft", training__beta=0.1),
    "an argument of data": changed(training__max_length=10),
    "an argument of the wrong type": changed(training__max_steps="many"),
    "an argument out of range": changed(training__per_device_train_batch_size=0),
    "an unknown trainer": changed(training__trainer="ppo"),
    "another task": changed(task="summarization"),
    "what happens at a NaN": changed(nonfinite="ignore"),
}


@pytest.fixture(scope="module")
def schema():
    found, failures = recipe_schema()
    assert failures == []
    return found


@pytest.fixture(scope="module")
def accepts(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid


@pytest.fixture
def loads(monkeypatch):
    """A function that returns whether the loader accepts a recipe, whose files need not exist."""
    monkeypatch.setattr(check, "check_source", lambda config: None)

    def load(recipe):
        try:
            check.check_recipe(Recipe.model_validate(recipe))
        except (UserError, ValidationError):
            return False
        return True

    return load


@pytest.mark.parametrize("name", [*WRITTEN, *GOOD])
def test_both_accept(accepts, loads, name):
    recipe = {**WRITTEN, **GOOD}[name]
    assert loads(recipe)
    assert accepts(recipe)


@pytest.mark.parametrize("name", BAD)
def test_both_refuse(accepts, loads, name):
    assert not loads(BAD[name])
    assert not accepts(BAD[name])


VALUES = (None, {}, [], ["zz"], {"zz": 2}, "zz", "", -1, 2, 0.5)  # not 0 and 1, which are also false and true


@pytest.mark.parametrize("name", sorted(installed_plugins()))
def test_whatever_options_a_plugin_takes_the_schema_accepts(schema, accepts, name):
    plugin, taken = load_plugin(name), 0
    for option in plugin.config.model_fields:
        for value in VALUES:
            with contextlib.suppress(ConfigError):
                plugin.from_options({option: value})
                taken += 1
                assert accepts(changed(plugins={name: {option: value}})), (option, value)
    assert taken or not plugin.config.model_fields


@pytest.mark.parametrize("name", TRAINERS)
def test_the_schema_accepts_the_arguments_that_are_taken_and_no_others(accepts, name):
    types = check.argument_types(TRAINERS[name])
    for key in types:
        for value in VALUES:
            arguments = {"output_dir": "out", key: value}
            taken = True
            try:
                check.check_arguments(arguments, types)
            except ConfigError:
                taken = False
            assert accepts(changed(training={"trainer": name, **arguments})) == taken, (key, value)


def test_the_documents_contain_recipes():
    assert len(WRITTEN) > 5


def test_rules_of_several_keys_are_the_loaders(accepts, loads):
    recipe = changed(data__format="preference")
    assert accepts(recipe)
    assert not loads(recipe)


def test_numbers_are_written_as_numbers(accepts, loads):
    recipe = changed(training__learning_rate="1e-3")  # 1e-3, as YAML 1.1 reads it
    assert loads(recipe)
    assert not accepts(recipe)


def test_every_key_has_a_title_or_description(schema):
    keys = {}
    for name, part in [("recipe", schema), *schema["$defs"].items()]:
        keys |= {f"{name}: {key}": value for key, value in part.get("properties", {}).items() if value is not True}
    assert len(keys) > 100
    assert [key for key, value in keys.items() if not value.keys() & {"title", "description", "$ref"}] == []
    texts = [value["description"] for value in keys.values() if "description" in value]
    assert not [text for text in texts if "``" in text or "::" in text or ":class:" in text]


def test_training_arguments_are_described_in_the_libraries_words(schema):
    steps = schema["$defs"]["training.sft"]["properties"]["save_steps"]
    assert steps["type"] == "number"
    assert "checkpoint" in steps["description"] or "save" in steps["description"].lower()
    assert {f"training.{name}" for name in TRAINERS} <= schema["$defs"].keys()


BROKEN = "import a_module_that_is_not_there"
OWN = """
from typing import Annotated
from pydantic import ConfigDict
from arctic_plugins import Plugin, PluginConfig

class Odd:
    pass

class Options(PluginConfig):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    odd: {type} = None
    '''An odd value of a :class:`~some.where.Kind`.

    .. versionadded:: 0.1
    '''

class plugin(Plugin):
    '''Odd ``things``.

    .. versionadded:: 0.1
    '''
    name, config = "odd", Options
"""


def test_a_third_partys_options_are_in_it(install_plugin):
    install_plugin("odd", OWN.replace("{type}", "int"))
    found, failures = recipe_schema()
    assert failures == []
    assert found["properties"]["plugins"]["properties"]["odd"]["description"] == "Odd things."
    assert found["$defs"]["odd"]["properties"]["odd"]["description"] == "An odd value of a Kind."


def test_a_broken_plugin_is_a_line_and_the_rest_is_printed(install_plugin, capsys):
    install_plugin("broken", BROKEN)
    install_plugin("odd", OWN.replace("{type}", "Odd"))
    command.main([], standalone_mode=False)
    output, error = capsys.readouterr()
    broken, odd = error.splitlines()
    assert "plugin 'broken' of distribution broken-dist 1.0 cannot be imported" in broken
    assert odd.startswith("arctic: the options of plugin 'odd' have no JSON schema: ")
    plugins = json.loads(output)["properties"]["plugins"]["properties"]
    assert {"fp8", "lora"} <= plugins.keys()
    assert not {"broken", "odd"} & plugins.keys()


def test_it_is_printed_without_importing_torch():
    code = (
        "import sys; from arctic_plugins_huggingface.cli.schema import schema; schema.main([], standalone_mode=False); "
        "print(*{'torch', 'transformers', 'trl'} & sys.modules.keys(), file=sys.stderr)"
    )
    assert run_python("-c", code).stderr.strip() == ""
