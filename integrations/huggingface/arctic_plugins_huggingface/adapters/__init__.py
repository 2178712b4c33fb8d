"""PEFT adapters over frozen weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_plugins._lazy import lazily

if TYPE_CHECKING:
    from arctic_plugins_huggingface.adapters.embeddings import new_token_rows
    from arctic_plugins_huggingface.adapters.lora import (
        FrozenLoraExperts,
        FrozenLoraLinear,
        expert_parameters,
        load_adapter,
        only_modules,
        prepare_new_rows,
        with_frozen_layer,
    )

__all__ = [
    "FrozenLoraExperts",
    "FrozenLoraLinear",
    "expert_parameters",
    "load_adapter",
    "new_token_rows",
    "only_modules",
    "prepare_new_rows",
    "with_frozen_layer",
]

__getattr__ = lazily(
    __name__,
    {
        "embeddings": ("new_token_rows",),
        "lora": (
            "FrozenLoraExperts",
            "FrozenLoraLinear",
            "expert_parameters",
            "prepare_new_rows",
            "load_adapter",
            "only_modules",
            "with_frozen_layer",
        ),
    },
)
