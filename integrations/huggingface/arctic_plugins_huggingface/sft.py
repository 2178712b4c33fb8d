"""``arctic train``: a recipe becomes TRL's ``SFTTrainer``, and the trained adapter a checkpoint. Read in trl 1.16.0."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from arctic_plugins.errors import ConfigError, suggest
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.data import load_rows
from arctic_plugins_huggingface.loading import load_model
from arctic_plugins_huggingface.recipe import Recipe
from arctic_plugins_huggingface.saving import check_new, save_checkpoint
from arctic_plugins_huggingface.training import attach

__all__ = ["TrainingResult", "train"]


@dataclass(frozen=True)
class TrainingResult:
    """What a training run leaves behind."""

    directory: Path
    """The final checkpoint."""
    history: list[dict[str, float]]
    """The Trainer's log: ``loss``, ``step``, ``learning_rate``, ..."""
    seconds: float
    steps: int
    trainable_parameters: int
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class _SFTTrainer(SFTTrainer):
    """TRL's trainer with the model's own loss where there is no GPU.

    TRL computes the loss with a fused head, a Triton kernel on GPUs; its torch fallback took 1.4 s of a step of 4.0 s on two cores
    (SmolLM2-135M, 8 x 140 tokens). The model's own loss needs the memory of the logits instead, less those before the first completion.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: torch.Tensor | int | None = None
    ) -> Any:
        if torch.accelerator.is_available():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return Trainer.compute_loss(self, model, {**_only_completions(inputs), "use_cache": False}, return_outputs, num_items_in_batch)


def _only_completions(inputs: dict[str, Any]) -> dict[str, Any]:
    """Ask for no logits at the positions that come before every completion of the batch: they have no part in the loss."""
    labels = inputs["labels"]
    in_loss = (labels != -100).any(dim=0).nonzero()
    if not len(in_loss):
        return inputs
    start = max(int(in_loss[0]) - 1, 0)  # the position before predicts the first label
    return {**inputs, "labels": labels[:, start:], "logits_to_keep": labels.shape[1] - start}


def train(
    recipe: Recipe, *, callbacks: list[TrainerCallback] | None = None, loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
) -> TrainingResult:
    """Run ``recipe`` and save the result in ``<output_dir>/final``.

    Args:
        recipe: what to do.
        callbacks: given to the Trainer as well.
        loaded: the model and tokenizer, if they were already loaded through the recipe's stack.

    Raises:
        UserError: everything that is wrong with the recipe, its data or its output directory, before weights are read.
    """
    stack = Stack.from_dict(recipe.plugins)
    arguments = training_arguments(recipe)
    stack.hf_training_arguments(arguments)
    final = Path(str(arguments.output_dir)) / "final"
    check_new(final)
    rows = load_rows(recipe.data)
    model, tokenizer = loaded or load_model(recipe.model, stack, **recipe.load)
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the tokenizer of {recipe.model} has no chat template", expected="a chat model", fix="set tokenizer.chat_template and save it"
        )
    trainer = attach(_SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks), stack)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    if trainer.is_world_process_zero():
        save_checkpoint(trainer.accelerator.unwrap_model(trainer.model), tokenizer, final, stack)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return TrainingResult(final, trainer.state.log_history, seconds, trainer.state.global_step, trainable, model, tokenizer)


def training_arguments(recipe: Recipe) -> SFTConfig:
    """The recipe's ``training`` as TRL's extension of ``TrainingArguments``.

    Raises:
        ConfigError: an unknown key (with the nearest known one) or a value that the library refuses.
    """
    known = {field.name for field in fields(SFTConfig) if field.init}
    for key in recipe.training:
        if key not in known:
            raise ConfigError(f"training.{key} is not a training argument", fix=suggest(key, known))
    if "output_dir" not in recipe.training:
        raise ConfigError("training.output_dir is missing", fix="name the directory that checkpoints go to")
    defaults = {
        "report_to": "none",
        "gradient_checkpointing": False,  # as in TrainingArguments; SFTConfig turns it on
        "use_cpu": not torch.accelerator.is_available(),  # transformers wants to be told before it trains in bfloat16 without a GPU
    }
    try:
        return SFTConfig(**{**defaults, "max_length": recipe.data.max_length, **recipe.training})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training is not valid: {error}", fix="correct the value it names") from error
