"""The JSON schema of a recipe, for editors and other tools. It imports neither torch nor the hosts.

The schema accepts every recipe whose numbers are written as numbers and that the loader accepts. It does not know rules
that concern several keys, files, or values for which a library has its own check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter

from arctic_plugins.discovery import installed_plugins, load_plugin
from arctic_plugins.errors import ConfigError, PluginError
from arctic_plugins.prose import paragraphs
from arctic_plugins_huggingface.training.check import AT_LEAST, NOT_LOADED, OURS, argument_help, argument_types
from arctic_plugins_huggingface.training.recipe import Recipe
from arctic_plugins_huggingface.training.trainers import TRAINERS, TRLTrainer, trl_trainer

__all__ = ["recipe_schema"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_ONE_OF = [  # path, or sources
    {"required": ["path"], "properties": {"path": {"type": "string"}}},
    {"required": ["sources"], "properties": {"sources": {"type": "array", "minItems": 1}}},
]


def recipe_schema() -> tuple[dict[str, Any], list[PluginError]]:
    """Return the JSON schema (draft 2020-12) of a recipe, and why some plugins are not in it.

    It contains the options of all installed plugins, and under ``training`` the arguments of each trainer that a recipe
    can name.
    """
    parts: dict[str, Any] = {}
    schema = _add(parts, "recipe", Recipe.model_json_schema)
    parts["recipe.DataConfig"]["oneOf"] = _ONE_OF
    found: dict[str, Any] = {}
    failures: list[PluginError] = []
    for name in installed_plugins():
        try:
            found[name] = _options(parts, name)
        except PluginError as error:
            failures.append(error)
    sections = schema["properties"]
    sections["plugins"] |= {"properties": found, "additionalProperties": False}
    sections["load"]["propertyNames"] = {"not": {"enum": sorted(NOT_LOADED)}}
    sections["training"] |= _training(parts)
    for key in ("plugins", "load", "nonfinite"):  # with nothing under it, a section is left out
        sections[key]["type"] = [sections[key]["type"], "null"]
    sections["nonfinite"]["enum"].append(None)
    schema |= {"required": ["model", "data", "training"], "$defs": parts}
    return {"$schema": DIALECT, **_plain(schema)}, failures


def _add(parts: dict[str, Any], name: str, generate: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Return a schema of pydantic whose definitions are in ``parts`` under ``name``."""
    schema = generate(ref_template=f"#/$defs/{name}.{{model}}")
    parts |= {f"{name}.{key}": part for key, part in schema.pop("$defs", {}).items()}
    return schema


def _options(parts: dict[str, Any], name: str) -> dict[str, Any]:
    plugin = load_plugin(name)
    try:
        parts[name] = _add(parts, name, plugin.config.model_json_schema)
    except Exception as error:  # a plugin's own types can raise anything, and all of it is reported
        raise PluginError(
            f"the options of plugin '{name}' have no JSON schema: {type(error).__name__}: {error}",
            fix=f"report it to the authors of '{name}'",
        ) from error
    return {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}], "description": plugin.__doc__ or ""}


def _training(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of ``training``, with the arguments of the trainer that it names."""
    branches = {}
    for name in TRAINERS:
        try:
            parts[f"training.{name}"] = _arguments(trl_trainer(name))
        except ConfigError:  # the installed TRL lacks it
            continue
        named = {"properties": {"trainer": {"const": name}}, **({} if name == "sft" else {"required": ["trainer"]})}
        branches[name] = {"if": named, "then": {"$ref": f"#/$defs/training.{name}"}}
    choice = {"enum": list(branches), "default": "sft", "description": "The name of one of TRL's trainers."}
    return {
        "properties": {"trainer": choice, "output_dir": {"type": "string", "minLength": 1}},
        "required": ["output_dir"],
        "allOf": list(branches.values()),
    }


def _arguments(trainer: TRLTrainer) -> dict[str, Any]:
    types, texts = argument_types(trainer), argument_help(trainer)
    arguments = {key: _argument(key, kind, texts) for key, kind in types.items() if key not in OURS}
    return {"properties": {"trainer": True, **arguments}, "additionalProperties": not types}


def _argument(key: str, kind: Any, texts: Mapping[str, str]) -> dict[str, Any]:
    least = {"minimum": AT_LEAST[key]} if key in AT_LEAST else {}
    return {**TypeAdapter(kind).json_schema(), **least, "description": texts.get(key, "")}


def _plain(schema: Any) -> Any:
    """Return ``schema`` with descriptions in plain text, and without those that are empty."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key != "description" or not isinstance(value, str):
            found[key] = value if key in ("default", "examples", "enum", "const") else _plain(value)
        elif value:
            found[key] = "\n\n".join(paragraphs(value))
    return found
