"""Loading what this project saved: a model, or an adapter on its base."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arctic_plugins.adapter import base_of
from arctic_plugins.errors import CheckpointError
from arctic_plugins.recorded import stack_from_checkpoint
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.files.check import adapter_directory
from arctic_plugins_huggingface.loading.config import load_tokenizer
from arctic_plugins_huggingface.loading.load import load_model

__all__ = ["adapter_base", "load_checkpoint", "own_tokenizer"]


def load_checkpoint(
    checkpoint: str | Path, stack: Stack | None = None, *, base: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what this project saved, or any model: an adapter directory comes back on its base, encoded as in training.

    Args:
        checkpoint: directory or hub id.
        stack: what to apply beside that: placements, which are never taken from a checkpoint.
        base: of an adapter, if it is not where its config says.

    Raises:
        CheckpointError: see :func:`~arctic_plugins_huggingface.load_model` and :func:`adapter_base`.
    """
    adapter = adapter_directory(checkpoint)
    if adapter is None:
        return load_model(checkpoint, stack)
    recorded = stack_from_checkpoint(adapter).to_use().without("adapter")
    model, tokenizer = load_model(adapter_base(adapter, base), recorded.plus(stack or Stack()))
    from arctic_plugins_huggingface.adapters.lora import load_adapter

    adapted = cast("PreTrainedModel", load_adapter(model, adapter).eval())  # to which a PeftModel forwards
    return adapted, own_tokenizer(adapter) or tokenizer


def own_tokenizer(adapter: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with an adapter: training may have given it another chat template than the
    base's.
    """
    return load_tokenizer(adapter) if (Path(adapter) / "tokenizer_config.json").is_file() else None


def adapter_base(adapter: Path, base: str | Path | None = None) -> str:
    """The model that the PEFT adapter in the directory ``adapter`` was trained on, or ``base`` if it is given.

    Raises:
        CheckpointError: its config does not name a base, or one inside of ``adapter``.
    """
    if base is not None:
        return str(base)
    base = base_of(adapter)
    if Path(base).resolve().is_relative_to(Path(adapter).resolve()):
        raise CheckpointError(
            f"{adapter} brings {base} as its own base",
            expected="a model that you chose",
            fix=f"--base {base}, if you trust it",
        )
    return base
