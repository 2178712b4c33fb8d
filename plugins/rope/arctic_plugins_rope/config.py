"""Options of the ``rope`` plugin."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from arctic_plugins import PluginConfig

__all__ = ["RoPEConfig"]

Positive = Annotated[float, Field(gt=0)]
Length = Annotated[int, Field(ge=2)]


class RoPEConfig(PluginConfig):
    """Options under ``rope:`` in a recipe. Defaults are derived from the other options and from the model."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"type": "yarn", "factor": 4.0}]})

    type: str
    """``llama3``, ``yarn``, ``linear``, ``dynamic``, ``longrope``, ``ntk``, or a type that an installed plugin
    registers.
    """
    max_position_embeddings: Length | None = None
    """The length to reach, in tokens. Either this or ``factor`` is required."""
    factor: Annotated[float, Field(ge=1)] | None = None
    """The factor by which the context grows. Left out: ``max_position_embeddings`` divided by the original length."""
    original_max_position_embeddings: Length | None = None
    """The length that the model was trained with. Left out: that of its config."""
    rope_theta: Positive | None = None
    """Base of the frequencies. Left out: the model's."""
    attention_factor: Positive | None = None
    """yarn and longrope: multiplies cosines and sines. Left out: ``0.1 ln(factor) + 1`` and ``sqrt(1 + ln(factor) /
    ln(original length))``.
    """
    beta_fast: Positive | None = None
    """yarn: dimensions that turn more often than this within the original length are not interpolated. Left out: 32."""
    beta_slow: Positive | None = None
    """yarn: those that turn less often than this are interpolated. Left out: 1."""
    truncate: bool | None = None
    """yarn: round the boundaries between them to whole dimensions. Left out: true."""
    low_freq_factor: Positive | None = None
    """llama3: wavelengths above the original length divided by this are interpolated. Left out: 1."""
    high_freq_factor: Positive | None = None
    """llama3: wavelengths below the original length divided by this are not interpolated. Left out: 4."""
    mixed_b: Positive | None = None
    """ntk: the exponent of mixed scaling. Left out: fixed scaling."""
    long_factor: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """longrope: a divisor for each frequency, used beyond the original length."""
    short_factor: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """longrope: a divisor for each frequency, used up to the original length. Left out: ones."""
    parameters: dict[str, Any] = {}
    """Further parameters of a type that an installed plugin registers."""
    layer_types: tuple[str, ...] | None = None
    """For models whose layers differ, for example Gemma 3: which of the config's ``layer_types`` are scaled. Left out:
    those without a sliding window.
    """
