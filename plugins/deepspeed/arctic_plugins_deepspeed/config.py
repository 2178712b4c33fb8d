"""Options of ``arctic convert --from deepspeed``."""

from __future__ import annotations

from typing import Literal

from arctic_plugins import PluginConfig

__all__ = ["DeepSpeedImport"]


class DeepSpeedImport(PluginConfig):
    """A training run with DeepSpeed-MoE, or with OptimizedLinear and LoRA, whose weights may be split into parts. OUT
    becomes a model, with LoRA merged, or an adapter.
    """

    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """The factor by which updates are multiplied; alpha/r if left out. ``alpha/r`` is DeepSpeed's, ``alpha/sqrt(r)``
    that of the original stack's converter."""
    alpha: float | None = None
    """Alpha, if config.json does not specify it (``ds_lora.lora_alpha``)."""
    base: str | None = None
    """The model that was trained, a directory or Hub id; OUT becomes a PEFT adapter on it instead of a merged
    checkpoint."""
