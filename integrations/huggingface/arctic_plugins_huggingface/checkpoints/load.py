"""Loading a model, or an adapter on its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arctic_plugins.adapter import base_of
from arctic_plugins.errors import CheckpointError
from arctic_plugins.recorded import stack_from_checkpoint
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.files.check import adapter_directory
from arctic_plugins_huggingface.loading.config import load_tokenizer
from arctic_plugins_huggingface.loading.load import load_model

__all__ = ["adapter_base", "ends_of", "load_checkpoint", "own_tokenizer"]


def load_checkpoint(
    checkpoint: str | Path, stack: Stack | None = None, *, base: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, or an adapter on its base model, which is encoded as in training.

    Args:
        checkpoint: directory or Hub id.
        stack: further plugins to apply: placements, which are never taken from a checkpoint.
        base: base model of an adapter; by default, the one that the adapter's config names.

    Raises:
        CheckpointError: see :func:`~arctic_plugins_huggingface.load_model` and :func:`adapter_base`.
    """
    adapter = adapter_directory(checkpoint)
    if adapter is None:
        return load_model(checkpoint, stack)
    recorded = stack_from_checkpoint(adapter).to_use().without("adapter")
    model, tokenizer = load_model(adapter_base(adapter, base), recorded.plus(stack or Stack()))
    from arctic_plugins_huggingface.adapters.lora import load_adapter

    adapted = cast("PreTrainedModel", load_adapter(model, adapter).eval())  # a PeftModel forwards to one
    own, generation = own_tokenizer(adapter), model.generation_config
    if own is not None and generation is not None:
        generation.eos_token_id = ends_of(generation.eos_token_id, own)
    return adapted, own or tokenizer


def own_tokenizer(adapter: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer saved with an adapter, if any: training may have given it a different chat template."""
    return load_tokenizer(adapter) if (Path(adapter) / "tokenizer_config.json").is_file() else None


def adapter_base(adapter: Path, base: str | Path | None = None) -> str:
    """Return the model that the PEFT adapter in the directory ``adapter`` was trained on, or ``base`` if given.

    Raises:
        CheckpointError: the adapter's config names no base, or one inside ``adapter``.
    """
    if base is not None:
        return str(base)
    base = base_of(adapter)
    if Path(base).resolve().is_relative_to(Path(adapter).resolve()):
        raise CheckpointError(
            f"{adapter} contains its own base model, {base}",
            expected="a model that you chose",
            fix=f"pass --base {base} if you trust it",
        )
    return base


def ends_of(known: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens at which generation stops: the ``known`` ones and the tokenizer's end-of-text token.

    A chat template that training gave the tokenizer may end answers with another token than the base model's.
    """
    ends: list[int] = [known] if isinstance(known, int) else known if isinstance(known, list) else []
    own = tokenizer.eos_token_id
    return ends if own is None or own in ends else [*ends, own]
