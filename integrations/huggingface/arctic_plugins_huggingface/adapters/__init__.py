"""PEFT adapters over frozen weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_plugins._lazy import lazily

if TYPE_CHECKING:
    from arctic_plugins_huggingface.adapters.layers import FrozenLoraLinear
    from arctic_plugins_huggingface.adapters.lora import (
        FrozenLoraExperts,
        expert_parameters,
        load_adapter,
        only_modules,
    )

__all__ = [
    "FrozenLoraExperts",
    "FrozenLoraLinear",
    "expert_parameters",
    "load_adapter",
    "only_modules",
]

__getattr__ = lazily(
    __name__,
    {
        "layers": ("FrozenLoraLinear",),
        "lora": (
            "FrozenLoraExperts",
            "expert_parameters",
            "load_adapter",
            "only_modules",
        ),
    },
)
