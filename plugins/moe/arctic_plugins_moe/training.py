"""What the ``moe`` plugin does to a Trainer."""

from __future__ import annotations

from typing import Any

from arctic_plugins_moe.config import MoEConfig

__all__ = ["attach"]


def attach(trainer: Any, options: MoEConfig) -> None:
    """Nothing yet."""
