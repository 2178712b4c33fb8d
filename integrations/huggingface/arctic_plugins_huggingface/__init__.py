"""The Hugging Face host: loading, training and saving with a stack.

Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_plugins._lazy import lazily

if TYPE_CHECKING:
    from arctic_plugins_huggingface.checkpoints.merge import merge_adapter
    from arctic_plugins_huggingface.checkpoints.save import save_checkpoint
    from arctic_plugins_huggingface.loading.load import freeze, load_model
    from arctic_plugins_huggingface.loading.plan import ModelPlan, plan_model
    from arctic_plugins_huggingface.loading.quantizer import register
    from arctic_plugins_huggingface.training.trainer import ArcticTrainingArguments, attach, last_checkpoint

__all__ = [
    "ArcticTrainingArguments",
    "ModelPlan",
    "attach",
    "freeze",
    "last_checkpoint",
    "load_model",
    "merge_adapter",
    "plan_model",
    "register",
    "save_checkpoint",
]

__getattr__ = lazily(
    __name__,
    {
        "checkpoints.merge": ("merge_adapter",),
        "checkpoints.save": ("save_checkpoint",),
        "loading.load": ("freeze", "load_model"),
        "loading.plan": ("ModelPlan", "plan_model"),
        "loading.quantizer": ("register",),
        "training.trainer": ("ArcticTrainingArguments", "attach", "last_checkpoint"),
    },
)
