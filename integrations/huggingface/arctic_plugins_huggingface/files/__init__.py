"""Files on disk: checking and rewriting checkpoints and adapters, and writing a directory completely or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_plugins._lazy import lazily

if TYPE_CHECKING:
    from arctic_plugins_huggingface.files.check import check_checkpoint
    from arctic_plugins_huggingface.files.rewrite import INDEX
    from arctic_plugins_huggingface.files.staging import check_new, staged, writing

__all__ = ["INDEX", "check_checkpoint", "check_new", "staged", "writing"]

__getattr__ = lazily(
    __name__,
    {"check": ("check_checkpoint",), "rewrite": ("INDEX",), "staging": ("check_new", "staged", "writing")},
)
