"""Options of the ``lora`` plugin: those of PEFT's ``LoraConfig`` that work over any codec."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from arctic_plugins.plugin import PluginConfig

__all__ = ["LoraOptions"]


class LoraOptions(PluginConfig):
    """What stands under ``lora:`` in a recipe; the names are PEFT's."""

    r: Annotated[int, Field(gt=0)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """The update is scaled by alpha / r (Hu et al., "LoRA", 2021), or alpha / sqrt(r) with ``use_rslora``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an input of the update while training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Which modules get an update: as in PEFT; ``all-linear`` is every linear module but the output head. Not the encoded experts of a mixture."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski, "rsLoRA", 2023)."""
