"""PEFT adapters over frozen weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_plugins._lazy import lazily

if TYPE_CHECKING:
    from arctic_plugins_huggingface.adapters.embeddings import new_token_rows
    from arctic_plugins_huggingface.adapters.layers import FrozenLoraLinear
    from arctic_plugins_huggingface.adapters.lora import (
        FrozenLoraExperts,
        expert_parameters,
        load_adapter,
        only_modules,
        prepare_new_rows,
    )

__all__ = [
    "FrozenLoraExperts",
    "FrozenLoraLinear",
    "expert_parameters",
    "load_adapter",
    "new_token_rows",
    "only_modules",
    "prepare_new_rows",
]

__getattr__ = lazily(
    __name__,
    {
        "embeddings": ("new_token_rows",),
        "layers": ("FrozenLoraLinear",),
        "lora": (
            "FrozenLoraExperts",
            "expert_parameters",
            "prepare_new_rows",
            "load_adapter",
            "only_modules",
        ),
    },
)
