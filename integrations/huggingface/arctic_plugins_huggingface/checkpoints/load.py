"""Loading a model, or an adapter on its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arctic_plugins.adapter import base_of, read_any_adapter
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.provenance import read_provenance
from arctic_plugins.recorded import stack_from_checkpoint
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.files.check import adapter_directory
from arctic_plugins_huggingface.loading.config import load_tokenizer, text_tokenizer
from arctic_plugins_huggingface.loading.load import load_model
from arctic_plugins_huggingface.loading.plan import plan_model
from arctic_plugins_huggingface.loading.tasks import LABELS, TASKS

__all__ = ["adapted_task", "adapter_base", "ends_of", "load_checkpoint", "own_tokenizer", "stop_at_end"]


def load_checkpoint(
    checkpoint: str | Path,
    stack: Stack | None = None,
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    generates: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, or an adapter on its base model, which is encoded as in training.

    Args:
        checkpoint: directory or Hub id.
        stack: further plugins to apply: placements, which are never taken from a checkpoint.
        base: base model of an adapter; by default, the one that the adapter's config names.
        trust_remote_code: whether the model's own code may be executed, if it needs it.
        generates: whether the model has to be one that generates text.

    Raises:
        CheckpointError: see :func:`~arctic_plugins_huggingface.load_model` and :func:`adapter_base`.
        ConfigError: the model is for a task without generation; raised before weights are read.
    """
    adapter = adapter_directory(checkpoint)
    if adapter is None:
        plan = plan_model(checkpoint, stack, trust_remote_code=trust_remote_code)
    else:
        recorded = stack_from_checkpoint(adapter).to_use().without("adapter").plus(stack or Stack())
        trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        plan = plan_model(adapter_base(adapter, base), recorded, **trust, **adapted_task(adapter))
    if generates and not plan.skeleton.can_generate():
        raise ConfigError(
            f"{checkpoint} is a model for {plan.task}, which does not generate text",
            expected="a model for text-generation",
            fix="serve it with 'arctic serve', or load it in Python with load_model",
        )
    model, tokenizer = load_model(plan)
    if adapter is None:
        return model, tokenizer
    from arctic_plugins_huggingface.adapters.lora import load_adapter

    adapted = cast("PreTrainedModel", load_adapter(model, adapter).eval())  # a PeftModel forwards to one
    if (own := own_tokenizer(adapter)) is not None:
        stop_at_end(model, own)
    return adapted, own or tokenizer


def adapted_task(adapter: Path) -> dict[str, Any]:
    """Return the arguments of ``plan_model`` that give an adapter's base model the task and the labels of the adapter.

    A base model that generates text keeps its own class.
    """
    named = next((task for task in TASKS.values() if task.peft == read_any_adapter(adapter).task_type), None)
    if named is None or named.peft == TASKS["text-generation"].peft:
        return {}
    labels = read_provenance(adapter).config if named.labels else {}
    return {"auto_class": named.auto_class, **{name: labels[name] for name in LABELS if name in labels}}


def own_tokenizer(adapter: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer or processor saved with an adapter, if any: training may have changed its chat template."""
    return load_tokenizer(adapter, processor=True) if (Path(adapter) / "tokenizer_config.json").is_file() else None


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


def stop_at_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generation with ``model``, if it generates, stop at the end-of-text token of ``tokenizer``."""
    generation = getattr(model, "generation_config", None)  # classifiers have none
    if generation is not None:
        generation.eos_token_id = ends_of(generation.eos_token_id, tokenizer)


def ends_of(known: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens at which generation stops: the ``known`` ones and the tokenizer's end-of-text token.

    A chat template that training gave the tokenizer may end answers with another token than the base model's.
    """
    ends: list[int] = [known] if isinstance(known, int) else known if isinstance(known, list) else []
    own = text_tokenizer(tokenizer).eos_token_id
    return ends if own is None or own in ends else [*ends, own]
