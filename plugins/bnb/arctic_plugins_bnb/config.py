"""Options of the ``bnb`` plugin."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from arctic_plugins import ModulePatterns, PluginConfig

__all__ = ["BnBConfig", "BnBFormat"]


class BnBFormat(PluginConfig):
    """The format in which weights are encoded."""

    type: Literal["nf4", "int8"] = "nf4"
    """``nf4``: 4 bits per weight and a scale for every 64. ``int8``: 8 bits and a scale for every output channel."""
    double_quant: bool = False
    """Store the scales of ``nf4`` in 8 bits, with a scale and an offset for every output channel."""

    @model_validator(mode="after")
    def _check_double_quant(self) -> BnBFormat:
        if self.double_quant and self.type != "nf4":
            raise ValueError("double_quant requires type 'nf4'")
        return self


class BnBConfig(ModulePatterns, BnBFormat):
    """Options under ``bnb:`` in a recipe."""
