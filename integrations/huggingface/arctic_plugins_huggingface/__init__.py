"""The Hugging Face host: loading, training and saving with a stack. Importing this package loads no torch and no
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arctic_plugins_huggingface.loading import freeze, load_model
    from arctic_plugins_huggingface.merging import merge_adapter
    from arctic_plugins_huggingface.quantizer import register
    from arctic_plugins_huggingface.saving import save_checkpoint
    from arctic_plugins_huggingface.training import ArcticTrainingArguments, attach, last_checkpoint

__all__ = [
    "ArcticTrainingArguments",
    "attach",
    "freeze",
    "last_checkpoint",
    "load_model",
    "merge_adapter",
    "register",
    "save_checkpoint",
]

_HOME = {
    "ArcticTrainingArguments": "training",
    "attach": "training",
    "freeze": "loading",
    "last_checkpoint": "training",
    "load_model": "loading",
    "merge_adapter": "merging",
    "register": "quantizer",
    "save_checkpoint": "saving",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
