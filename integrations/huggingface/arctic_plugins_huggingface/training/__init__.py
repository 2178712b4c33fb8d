"""Training with a recipe or with your own Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_plugins._lazy import lazily

if TYPE_CHECKING:
    from arctic_plugins_huggingface.training.engines import TrainerEngine
    from arctic_plugins_huggingface.training.experts_ddp import SpreadExperts
    from arctic_plugins_huggingface.training.preparation import Run, prepare
    from arctic_plugins_huggingface.training.progress import peak_memory, progress_bar
    from arctic_plugins_huggingface.training.recipe import DataConfig, Recipe
    from arctic_plugins_huggingface.training.result import TrainingResult
    from arctic_plugins_huggingface.training.run import train
    from arctic_plugins_huggingface.training.trainer import ArcticTrainingArguments, attach, last_checkpoint

__all__ = [
    "ArcticTrainingArguments",
    "DataConfig",
    "Recipe",
    "Run",
    "SpreadExperts",
    "TrainerEngine",
    "TrainingResult",
    "attach",
    "last_checkpoint",
    "peak_memory",
    "prepare",
    "progress_bar",
    "train",
]

__getattr__ = lazily(
    __name__,
    {
        "engines": ("TrainerEngine",),
        "experts_ddp": ("SpreadExperts",),
        "preparation": ("Run", "prepare"),
        "progress": ("peak_memory", "progress_bar"),
        "recipe": ("DataConfig", "Recipe"),
        "result": ("TrainingResult",),
        "run": ("train",),
        "trainer": ("ArcticTrainingArguments", "attach", "last_checkpoint"),
    },
)
