"""The result of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from arctic_plugins_huggingface.training.counts import DataCounts

__all__ = ["TrainingResult"]


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training run."""

    directory: Path
    """The final checkpoint."""
    history: list[dict[str, float]]
    """The Trainer's log: ``loss``, ``step``, ``learning_rate``, ..."""
    seconds: float
    """Duration of this process's steps; a resumed run counts from where it resumed."""
    steps: int
    """Optimizer steps of the whole run."""
    tokens: int
    """Tokens that this process has seen, without padding."""
    trainable_parameters: int
    """Numbers in parameters that were trained."""
    counts: DataCounts
    """How many rows were used, truncated and skipped."""
    model: PreTrainedModel
    """The trained model."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer, or the processor of a model that reads images."""
