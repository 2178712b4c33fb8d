"""The Hugging Face host: loading, training and saving with a stack. Importing this package loads no torch and no
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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

_HOME = {
    "ArcticTrainingArguments": "training.trainer",
    "attach": "training.trainer",
    "freeze": "loading.load",
    "last_checkpoint": "training.trainer",
    "load_model": "loading.load",
    "ModelPlan": "loading.plan",
    "merge_adapter": "checkpoints.merge",
    "plan_model": "loading.plan",
    "register": "loading.quantizer",
    "save_checkpoint": "checkpoints.save",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
