"""Check what can be checked in a recipe without importing torch or the hosts, so that errors appear within a second.

Read in transformers 5.19.0, trl 1.16.0.
"""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import ConfigError, DataError, PluginNotFoundError, named, suggest
from arctic_plugins.plugin import expectation
from arctic_plugins.processes import is_first
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.files.check import check_checkpoint, is_directory
from arctic_plugins_huggingface.files.locking import LOCK
from arctic_plugins_huggingface.training.recipe import FILE_KINDS, LABELED, DataConfig, Recipe
from arctic_plugins_huggingface.training.templates import read_template
from arctic_plugins_huggingface.training.trainers import TRAINERS, TRLTrainer, trl_trainer

__all__ = [
    "argument_help",
    "argument_types",
    "check_arguments",
    "check_engine",
    "check_output",
    "check_recipe",
    "check_source",
    "check_trainer",
]

OURS = {
    "max_length": "data.max_length",
    "packing": "data.packing",
    "completion_only_loss": "data.loss",
    "assistant_only_loss": "data.loss",
}
"""Fields of the trainers' configs that a recipe sets under ``data``."""
NOT_LOADED = frozenset({"auto_class", "checked", "config", "stack"})
"""Arguments of this project's own loader and of ``from_pretrained`` that a recipe cannot set under ``load``."""
_LABELS = ("num_labels", "id2label", "label2id", "problem_type")
AT_LEAST = {
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"), 0),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
}
"""Training argument -> its smallest value, where transformers does not check it."""


def check_recipe(recipe: Recipe) -> Stack:
    """Return the stack of ``recipe`` after checking its plugins, arguments, data files and checkpoint, in this order.

    A checkpoint on the Hub is not checked.

    Raises:
        UserError: if something is wrong with one of them.
    """
    stack = Stack.from_dict(recipe.plugins)
    trainer = check_trainer(recipe)
    check_arguments(recipe.arguments, argument_types(trainer))
    if (frozen := [*stack.only("weight_codec"), *stack.only("placement")]) and not stack.only("adapter"):
        names = ", ".join(dict.fromkeys(plugin.name for plugin in frozen))
        raise ConfigError(
            f"the plugins freeze the weights ({names}), and none adds trainable parameters",
            expected="an adapter",
            fix="add 'lora: {}'",
        )
    if trainer.preference and (splitting := next((plugin for plugin in stack if plugin.row_processes > 1), None)):
        raise ConfigError(
            f"training.trainer is '{trainer.name}', which compares whole texts, but the plugin '{splitting.name}' "
            "splits them over processes",
            fix="leave that option out, or train with sft",
        )
    if frozen and recipe.training.get("deepspeed"):
        check_engine("deepspeed")
    if recipe.nonfinite == "skip" and recipe.training.get("deepspeed"):
        raise ConfigError(
            "nonfinite is 'skip', but DeepSpeed runs the steps", expected="'stop'", fix="leave 'nonfinite' out"
        )
    if ours := sorted(NOT_LOADED & recipe.load.keys()):
        raise ConfigError(
            f"load.{ours[0]} is not an argument of from_pretrained that a recipe can set", fix="leave it out"
        )
    if recipe.data.format in LABELED and (labels := sorted(recipe.load.keys() & _LABELS)):
        raise ConfigError(f"load.{labels[0]} is set", expected="data.labels instead", fix="leave it out")
    if isinstance(devices := recipe.load.get("device_map"), dict) and "disk" in devices.values():
        raise ConfigError(
            "load.device_map puts modules on 'disk', which accelerate supports for inference only",
            expected="the plugin 'offload', which also trains",
            fix="leave device_map out and add 'offload: {to: disk}'",
        )
    check_source(recipe.data)
    if is_directory(recipe.model):
        check_checkpoint(recipe.model, contents=False, **recipe.load)
    return stack


def check_trainer(recipe: Recipe) -> TRLTrainer:
    """Return the trainer of ``recipe``, after checking that it trains on the format of the data.

    Raises:
        ConfigError: it does not, or there is no such trainer.
    """
    trainer = trl_trainer(recipe.trainer)
    kind = recipe.data.train_sources[0].format
    if trainer.preference != (kind == "preference"):
        others = ", ".join(name for name, other in TRAINERS.items() if other.preference)
        raise ConfigError(
            f"training.trainer is '{trainer.name}', but data.format is '{kind}'",
            expected="format 'preference'" if trainer.preference else f"one of the trainers {others}",
            fix="set data.format" if trainer.preference else "set training.trainer, for example to dpo",
        )
    return trainer


def check_engine(name: str) -> None:
    """Raise PluginNotFoundError unless a plugin prepares the library ``name`` for frozen and spread modules.

    The library runs the Trainer's steps.
    """
    with named(f"training.{name} with frozen or spread weights", PluginNotFoundError):
        process_registry().check_trainer_engine(name)


def check_source(config: DataConfig) -> None:
    """Raise DataError if a data file is missing, or ConfigError if a chat template is neither known nor a file."""
    paths = (
        {"path": config.path}
        if config.sources is None
        else {f"sources[{at}].path": source.path for at, source in enumerate(config.sources)}
    )
    for key, path in {**paths, "eval_path": config.eval_path}.items():
        if (
            path is not None
            and not Path(path).is_file()
            and (Path(path).suffix in FILE_KINDS or Path(path).is_absolute() or Path(path).exists())
        ):
            found = "is a directory" if Path(path).is_dir() else "does not exist"
            raise DataError(
                f"data.{key} {path} {found}",
                expected="a JSON, JSONL, CSV, TSV or Parquet file",
                fix=f"correct data.{key}",
            )
    if config.chat_template is not None:
        read_template(config.chat_template)


def check_output(output: Path, *, new: bool) -> None:
    """Raise ConfigError unless ``output`` is writable and, if ``new``, does not exist or is empty.

    If there are several processes, only the first one checks.
    """
    if not is_first():
        return
    if output.exists() and not output.is_dir():
        raise ConfigError(f"training.output_dir {output} is a file", expected="a directory", fix="choose another")
    if new and output.exists() and any(path.name != LOCK for path in output.iterdir()):
        raise ConfigError(
            f"training.output_dir {output} exists and is not empty",
            expected="a new directory",
            fix="--resume continues the run that started there, --overwrite removes its checkpoints, or choose another",
        )
    existing = next(parent for parent in (output, *output.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"training.output_dir {output} cannot be written: {existing} is not a writable directory",
            fix="choose another, or change its permissions",
        )


@functools.cache
def argument_types(trainer: TRLTrainer) -> dict[str, Any]:
    """Return the type of each training argument, as declared in the source of the config of TRL's ``trainer``.

    The type is ``Any`` where resolving it would take an import. The result is empty if the source is not where it is
    expected: everything that is checked with it is checked again once the class has been imported.
    """
    return {name: _evaluated(field.annotation) for name, field in _declared(trainer).items()}


def argument_help(trainer: TRLTrainer) -> dict[str, str]:
    """Return the descriptions of training arguments in the same source: ``help`` in the metadata of their fields."""
    found: dict[str, str] = {}
    for name, field in _declared(trainer).items():
        for node in ast.walk(field.value) if field.value is not None else ():
            for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
                if isinstance(key, ast.Constant) and key.value == "help" and isinstance(value, ast.Constant):
                    found[name] = " ".join(str(value.value).split())
    return found


@functools.cache
def _declared(trainer: TRLTrainer) -> dict[str, ast.AnnAssign]:
    declared: dict[str, ast.AnnAssign] = {}
    sources = {"transformers": ("training_args.py",), "trl": ("trainer/base_config.py", trainer.source)}
    classes = ("TrainingArguments", "_BaseConfig", f"{trainer.classes}Config")
    try:
        for package, files in sources.items():
            spec = find_spec(package)
            for name in files if spec and spec.origin else ():
                tree = ast.parse((Path(str(spec and spec.origin)).parent / name).read_bytes())
                for body in [
                    found.body for found in tree.body if isinstance(found, ast.ClassDef) and found.name in classes
                ]:
                    declared |= {ast.unparse(line.target): line for line in body if isinstance(line, ast.AnnAssign)}
    except (OSError, SyntaxError):
        return {}
    return declared if "output_dir" in declared and "max_length" in declared else {}


_BUILTIN = {"Any": Any, "Literal": Literal} | {found.__name__: found for found in (bool, dict, float, int, list, str)}


def _evaluated(annotation: ast.expr) -> Any:
    if not {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} <= _BUILTIN.keys():
        return Any
    return eval(compile(ast.Expression(annotation), "annotation", "eval"), {"__builtins__": {}}, _BUILTIN)  # noqa: S307 - only these names


def check_arguments(training: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's ``training`` with each value converted to its type in ``types``; unchecked without ``types``.

    Raises:
        ConfigError: if a key is unknown (the nearest known one is named) or belongs under ``data``, a value has the
            wrong type, or ``output_dir`` is missing.
    """
    if not types:
        return dict(training)
    for key in training:
        if key not in types:
            raise ConfigError(f"training.{key} is not a training argument", fix=suggest(key, types))
        if key in OURS:
            raise ConfigError(f"training.{key} is set", expected=f"{OURS[key]} instead", fix="move it under 'data'")
    given = {key: _checked(key, value, types[key]) for key, value in training.items()}
    if not given.get("output_dir"):
        raise ConfigError("training.output_dir is missing", fix="set it to a directory for checkpoints")
    return given


def _checked(key: str, value: Any, kind: Any) -> Any:
    """Return ``value`` converted to the type that the argument declares.

    transformers does not check types, and YAML reads 1e-3, without a dot, as a string.
    """
    try:
        checked = TypeAdapter(kind, config={"arbitrary_types_allowed": True}).validate_python(value)
    except ValidationError as error:
        raise ConfigError(
            f"training.{key} is {value!r}", expected=expectation(error), fix="correct the value"
        ) from error
    if isinstance(checked, (int, float)) and not checked >= AT_LEAST.get(key, checked if checked == checked else 0):
        raise ConfigError(
            f"training.{key} is {checked}", expected=f"at least {AT_LEAST.get(key, 0)}", fix="correct the value"
        )
    return checked
