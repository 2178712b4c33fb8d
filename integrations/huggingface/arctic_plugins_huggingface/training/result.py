"""What a training run returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from arctic_plugins_huggingface.training.data import DataCounts

__all__ = ["TrainingResult"]


@dataclass(frozen=True)
class TrainingResult:
    """What a training run leaves behind."""

    directory: Path
    """The final checkpoint."""
    history: list[dict[str, float]]
    """The Trainer's log: ``loss``, ``step``, ``learning_rate``, ..."""
    seconds: float
    """Of this process's steps; a resumed run counts from where it resumed."""
    steps: int
    tokens: int
    """Without padding, this process's."""
    trainable_parameters: int
    counts: DataCounts
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
