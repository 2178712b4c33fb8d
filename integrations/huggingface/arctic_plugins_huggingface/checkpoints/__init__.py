"""Saving, loading, merging, exporting and converting whole checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_plugins._lazy import lazily

if TYPE_CHECKING:
    from arctic_plugins_huggingface.checkpoints.export import convert_checkpoint, export_checkpoint
    from arctic_plugins_huggingface.checkpoints.gather import is_spread
    from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
    from arctic_plugins_huggingface.checkpoints.merge import Update, merge_adapter
    from arctic_plugins_huggingface.checkpoints.save import SHARD_SIZE, save_checkpoint

__all__ = [
    "SHARD_SIZE",
    "Update",
    "convert_checkpoint",
    "export_checkpoint",
    "is_spread",
    "load_checkpoint",
    "merge_adapter",
    "save_checkpoint",
]

__getattr__ = lazily(
    __name__,
    {
        "export": ("convert_checkpoint", "export_checkpoint"),
        "gather": ("is_spread",),
        "load": ("load_checkpoint",),
        "merge": ("Update", "merge_adapter"),
        "save": ("SHARD_SIZE", "save_checkpoint"),
    },
)
