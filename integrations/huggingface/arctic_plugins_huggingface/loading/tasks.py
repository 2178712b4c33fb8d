"""The tasks that models are loaded for: which class a checkpoint is loaded with, and which part of it is the head.

Tasks have the names of transformers' pipelines and of the Hub's ``pipeline_tag``. Read in transformers 5.19.0
(``models/auto``, ``modeling_utils.py``, ``modeling_layers.py``) and peft 0.21.2 (``utils/peft_types.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from arctic_plugins.errors import CheckpointError, ConfigError, suggest

__all__ = [
    "LABELS",
    "TASKS",
    "Task",
    "architectures_of",
    "check_task",
    "head_modules",
    "labels_of",
    "named_task",
    "pretrained_part",
    "task_name",
    "task_of",
    "task_of_model",
    "tasks_for",
]


@dataclass(frozen=True)
class Task:
    """Something that models are trained for and used for."""

    name: str
    """Its name in a recipe."""
    auto_class: Any
    """The class of transformers that chooses the model's class."""
    peft: str
    """PEFT's ``task_type``."""
    labels: bool = False
    """Whether the model's config has labels, ``id2label``."""


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("image-text-to-text", AutoModelForImageTextToText, "CAUSAL_LM"),
        Task("text-generation", AutoModelForCausalLM, "CAUSAL_LM"),
        Task("text-classification", AutoModelForSequenceClassification, "SEQ_CLS", labels=True),
        Task("token-classification", AutoModelForTokenClassification, "TOKEN_CLS", labels=True),
        Task("question-answering", AutoModelForQuestionAnswering, "QUESTION_ANS"),
        Task("feature-extraction", AutoModel, "FEATURE_EXTRACTION"),
    )
}
"""Task by name. A class that serves two tasks belongs to the first of them."""

LABELS = ("num_labels", "id2label", "label2id", "problem_type", "pad_token_id")
"""Arguments of ``from_pretrained`` that change what a classifier's config has beyond its base model's."""


def named_task(name: str) -> Task:
    """Return the task called ``name``.

    Raises:
        ConfigError: there is no such task; the message lists all of them.
    """
    if name not in TASKS:
        raise ConfigError(f"task is {name!r}", expected=f"one of {', '.join(sorted(TASKS))}", fix=suggest(name, TASKS))
    return TASKS[name]


def task_of(config: PreTrainedConfig, architecture: str | None = None) -> Task | None:
    """Return the task of the model class called ``architecture``; None if it is none of :data:`TASKS`.

    By default, that is the class that the checkpoint's ``architectures`` names.
    """
    architecture = architecture or next(iter(architectures_of(config)), "")
    return next((task for task in TASKS.values() if architecture in _class_names(task.auto_class, config)), None)


def architectures_of(config: PreTrainedConfig) -> list[str]:
    """Return the model classes that a checkpoint's config names; nothing makes sure that these are names."""
    named = config.architectures
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def tasks_for(config: PreTrainedConfig) -> list[str]:
    """Return the names of the tasks for which there is a class for ``config``."""
    return sorted(name for name, task in TASKS.items() if any(_class_names(task.auto_class, config)))


def task_name(auto_class: Any) -> str:
    """Return the name of the task that ``auto_class`` is for; the name of the class if it is none of :data:`TASKS`."""
    return next((task.name for task in TASKS.values() if task.auto_class is auto_class), auto_class.__name__)


def check_task(config: PreTrainedConfig, auto_class: Any) -> None:
    """Raise CheckpointError if ``auto_class`` has no class for ``config``; the message lists the tasks that have one.

    transformers would list all types of models that ``auto_class`` has.
    """
    if not hasattr(auto_class, "_model_mapping") or any(_class_names(auto_class, config)):
        return
    possible = tasks_for(config)
    raise CheckpointError(
        f"models of type {config.model_type} have no class for the task {task_name(auto_class)}",
        expected=f"the task {' or '.join(possible)}" if possible else f"a model for {', '.join(sorted(TASKS))}",
        fix="set 'task' (--task, or auto_class in Python)" if possible else "use another model",
    )


def _class_names(auto_class: Any, config: PreTrainedConfig) -> Iterator[str]:
    """Yield the names of the classes between which ``auto_class`` chooses for ``config``, without importing them."""
    mapping = auto_class._model_mapping
    if (registered := mapping._extra_content.get(type(config))) is not None:
        yield registered.__name__
    found = mapping._model_mapping.get(config.model_type, ())
    yield from (found,) if isinstance(found, str) else found
    auto_map = getattr(config, "auto_map", None)
    own_code = auto_map.get(auto_class.__name__) if isinstance(auto_map, Mapping) else None
    if isinstance(own_code, str):
        yield own_code.rpartition(".")[2]


def task_of_model(model: Any) -> Task | None:
    """Return the task of ``model``, adapted or not; None if it is none of :data:`TASKS`."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(plain, "config", None)
    return task_of(config, type(plain).__name__) if isinstance(config, PreTrainedConfig) else None


def labels_of(model: Any) -> dict[str, Any]:
    """Return the labels of ``model`` as arguments of ``from_pretrained``, with JSON types only; empty without labels.

    They are in the config of a model. An adapter has no config, and that of its base model has other labels, or none.
    """
    task = task_of_model(model)
    if task is None or not task.labels:
        return {}
    named: dict[str, Any] = {"id2label": {str(number): label for number, label in model.config.id2label.items()}}
    others = {name: getattr(model.config, name, None) for name in ("problem_type", "pad_token_id")}
    return named | {name: value for name, value in others.items() if value is not None}


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of the outermost modules with parameters that a task has added to a language model: its head.

    They are what has to be trained. Empty if the task adds nothing, as for text generation.
    """
    task = task_of_model(model)
    if task is None or task.name in ("image-text-to-text", "text-generation", "feature-extraction"):
        return []
    is_part, heads = pretrained_part(model), list[str]()
    inside = {name for name, _ in model.named_parameters() if is_part(name)}
    for name, module in model.named_modules():
        if (
            not any(f"{name}.".startswith(f"{head}.") for head in heads)
            and not is_part(name)
            and not any(known.startswith(f"{name}.") or not name for known in inside)
            and any(True for _ in module.parameters())
        ):
            heads.append(name)
    return heads


def pretrained_part(model: Any) -> Callable[[str], bool]:
    """Return a function that tells whether the module or parameter of a dotted name is part of the language model.

    That is transformers' base model, without its pooler, and the output embedding. Everything else is a head, which a
    task adds and trains, or reads images and other inputs: it stays plain.
    """
    base = getattr(model, "base_model", model)
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig) and config.get_text_config() is not config:
        base = base.get_decoder()
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    roots = [f"{name}." if name else "" for name, module in model.named_modules() if module is base or module is output]

    def is_part(name: str) -> bool:
        root = next((root for root in roots if f"{name}.".startswith(root)), None)
        return root is not None and not f"{name}.".startswith(f"{root}pooler.")

    return is_part
