"""Check everything about a run except the weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from datasets import disable_progress_bars
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from arctic_plugins.errors import ConfigError
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.files.check import is_directory
from arctic_plugins_huggingface.loading.plan import ModelPlan, plan_model
from arctic_plugins_huggingface.loading.rope import positions
from arctic_plugins_huggingface.training.arguments import training_arguments
from arctic_plugins_huggingface.training.check import check_recipe, check_trainer
from arctic_plugins_huggingface.training.counts import Limits
from arctic_plugins_huggingface.training.data import TrainingData, load_data
from arctic_plugins_huggingface.training.recipe import Recipe
from arctic_plugins_huggingface.training.templates import set_template

__all__ = ["Run", "prepare"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A checked recipe with everything that it needs except the weights."""

    recipe: Recipe
    arguments: TrainingArguments
    model: ModelPlan
    data: TrainingData

    @property
    def stack(self) -> Stack:
        """The recipe's plugins."""
        return self.model.stack

    @property
    def final(self) -> Path:
        """The directory for the trained model."""
        return Path(str(self.arguments.output_dir)) / "final"


def prepare(recipe: Recipe, stack: Stack | None = None) -> Run:
    """Check everything about ``recipe`` that can be known without reading weights, and tokenize its data.

    Args:
        recipe: the recipe to check.
        stack: what :func:`~arctic_plugins_huggingface.training.check.check_recipe` returned for it, if it was called.

    Raises:
        UserError: if something is wrong with the plugins, the training arguments, the data or the checkpoint.
    """
    stack = check_recipe(recipe) if stack is None else stack
    arguments = training_arguments(recipe)
    stack.hf_training_arguments(arguments)
    # A directory was already checked with the recipe.
    model = plan_model(
        recipe.model, stack, checked=is_directory(recipe.model), new_tokens=recipe.data.new_tokens, **recipe.load
    )
    if recipe.data.chat_template is not None:
        set_template(model.tokenizer, recipe.data.chat_template)
    _check_padding(model)
    disable_progress_bars()
    data = load_data(
        recipe.data,
        model.tokenizer,
        seed=arguments.seed,
        keep_end=getattr(arguments, "truncation_mode", "") == "keep_end",
        limits=Limits(positions(model.config), model.embeddings),
        trainer=check_trainer(recipe),
    )
    if recipe.data.streaming and arguments.max_steps <= 0:
        raise ConfigError(
            "data.streaming is on, but training.max_steps is not set",
            expected="a number of steps",
            fix="set training.max_steps",
        )
    if data.eval is None and arguments.eval_strategy != "no":
        strategy = IntervalStrategy(arguments.eval_strategy)
        raise ConfigError(
            f"training.eval_strategy is '{strategy.value}', but there is nothing to evaluate on",
            fix="set data.eval_path, data.eval_split or data.eval_size",
        )
    return Run(recipe, arguments, model, data)


def _check_padding(model: ModelPlan) -> None:
    """Pad with the end-of-text token if the model has no embedding for the padding token, which nothing learns from."""
    tokenizer, rows = model.tokenizer, model.embeddings
    if rows is not None and tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        logger.warning(
            "the model has %s embeddings and none for the padding token %r (%s): padding with %r",
            *(rows, tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token),
        )
        tokenizer.pad_token = tokenizer.eos_token
