"""Loading a model from a checkpoint and a stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_plugins._lazy import lazily

if TYPE_CHECKING:
    from arctic_plugins_huggingface.loading.config import STORED, load_config, load_tokenizer
    from arctic_plugins_huggingface.loading.load import encoding_report, freeze, load_model
    from arctic_plugins_huggingface.loading.plan import ModelPlan, WeightPlan, plan_model
    from arctic_plugins_huggingface.loading.quantizer import register
    from arctic_plugins_huggingface.loading.tasks import TASKS, Task, head_modules, pretrained_part, task_of_model
    from arctic_plugins_huggingface.loading.weights import frozen_weights, weight_specs

__all__ = [
    "STORED",
    "TASKS",
    "ModelPlan",
    "Task",
    "WeightPlan",
    "encoding_report",
    "freeze",
    "frozen_weights",
    "head_modules",
    "load_config",
    "load_model",
    "load_tokenizer",
    "plan_model",
    "pretrained_part",
    "register",
    "task_of_model",
    "weight_specs",
]

__getattr__ = lazily(
    __name__,
    {
        "config": ("STORED", "load_config", "load_tokenizer"),
        "load": ("encoding_report", "freeze", "load_model"),
        "plan": ("ModelPlan", "WeightPlan", "plan_model"),
        "quantizer": ("register",),
        "tasks": ("TASKS", "Task", "head_modules", "pretrained_part", "task_of_model"),
        "weights": ("frozen_weights", "weight_specs"),
    },
)
