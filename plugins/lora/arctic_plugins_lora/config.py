"""Options of the ``lora`` plugin: those of PEFT's ``LoraConfig`` that work over any codec."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from arctic_plugins import PluginConfig

__all__ = ["LoraOptions"]


class LoraOptions(PluginConfig):
    """Options under ``lora:`` in a recipe; the names are PEFT's."""

    r: Annotated[int, Field(gt=0)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """The update is scaled by alpha / r (Hu et al., "LoRA", 2021), or alpha / sqrt(r) with ``use_rslora``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of the update's input in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules that get an update, as in PEFT. ``all-linear`` is every linear module except the output head; the experts
    of a mixture are not included.
    """
    experts: bool = False
    """Also adapt the experts of a mixture, with a pair of matrices for each expert: PEFT's ``target_parameters``."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski, "rsLoRA", 2023)."""

    @model_validator(mode="after")
    def _check_dropout(self) -> LoraOptions:
        if self.experts and self.dropout:
            raise ValueError(
                f"dropout {self.dropout} with experts: PEFT does not support dropout for experts; leave one of the two "
                "out"
            )
        return self
