"""Options of the ``fp8`` plugin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from arctic_plugins import ModulePatterns, PluginConfig
from arctic_plugins_fp8.formats import FORMATS

__all__ = ["FP8Config", "FP8Format"]


class FP8Format(PluginConfig):
    """The format in which weights are encoded."""

    bits: Literal[6, 8, 12] = 8
    """Bits per weight: 8 is e4m3, 6 is e3m2, 12 is e4m7."""
    group_size: Literal["channel"] | Annotated[int, Field(ge=32, le=512)] = "channel"
    """Weights that share a scale: an output channel, or this many weights along the input dimension. Left out:
    ``channel``, or 128 for 6 bits.
    """
    scale: Literal["max", "mse"] = "max"
    """``max``: maps the largest magnitude to the format's largest number. ``mse``: tries 16 scales and keeps the one
    with the smallest squared error, which takes longer. Left out: ``max``, or ``mse`` for 6 bits."""

    activations: Literal["full", "fp8"] = "full"
    """``fp8``: also round inputs to e4m3, each token with its own scale, which GPUs of compute capability 8.9 or later
    multiply faster. Only with 8 bits and ``group_size: channel``."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_6_bits(cls, options: Any) -> Any:
        if isinstance(options, Mapping) and options.get("bits") == 6:
            return {"group_size": 128, "scale": "mse", **options}
        return options

    @model_validator(mode="after")
    def _check_group_size(self) -> FP8Format:
        unit = FORMATS[self.bits].unit
        if self.group_size != "channel" and self.group_size % unit:
            raise ValueError(
                f"group_size {self.group_size} does not fill whole bytes at {self.bits} bits; expected a multiple "
                f"of {unit}"
            )
        if self.activations == "fp8" and (self.bits, self.group_size) != (8, "channel"):
            raise ValueError("activations 'fp8' requires bits 8 and group_size 'channel'")
        return self


class FP8Config(ModulePatterns, FP8Format):
    """Options under ``fp8:`` in a recipe."""

    formats: Mapping[str, FP8Format] = {}
    """Formats for modules that are encoded differently: a mapping of patterns, as in ``include``, to formats. Two
    different formats for one module are an error.
    """
