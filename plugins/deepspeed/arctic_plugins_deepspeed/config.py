"""Options of ``arctic convert --from deepspeed``."""

from __future__ import annotations

from typing import Literal

from arctic_plugins import PluginConfig

__all__ = ["DeepSpeedImport"]


class DeepSpeedImport(PluginConfig):
    """A training run, of DeepSpeed-MoE or of OptimizedLinear with LoRA, its weights perhaps in parts. OUT is a model,
    with LoRA merged, or an adapter.
    """

    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """What updates are multiplied by; alpha/r if left out. ``alpha/r`` is DeepSpeed's, ``alpha/sqrt(r)`` that of the
    original stack's converter."""
    alpha: float | None = None
    """Alpha, where config.json does not say it (``ds_lora.lora_alpha``)."""
    base: str | None = None
    """The model that was trained, a directory or hub id; OUT becomes a PEFT adapter on it instead of a merged
    checkpoint."""
