"""Check everything about a run except the weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from datasets import disable_progress_bars
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from arctic_plugins.errors import ConfigError
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.files.check import check_checkpoint, is_directory
from arctic_plugins_huggingface.loading.config import load_config, only_hub, text_tokenizer
from arctic_plugins_huggingface.loading.plan import ModelPlan, plan_model
from arctic_plugins_huggingface.loading.rope import positions
from arctic_plugins_huggingface.loading.tasks import named_task, task_of
from arctic_plugins_huggingface.training.arguments import training_arguments
from arctic_plugins_huggingface.training.check import check_recipe, check_trainer
from arctic_plugins_huggingface.training.counts import Limits
from arctic_plugins_huggingface.training.data import TrainingData, load_data
from arctic_plugins_huggingface.training.labeled import Labels, load_labeled, read_labels
from arctic_plugins_huggingface.training.recipe import LABELED, Recipe
from arctic_plugins_huggingface.training.templates import set_template

__all__ = ["Run", "prepare"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A checked recipe with everything that it needs except the weights."""

    recipe: Recipe
    """The recipe, with paths relative to its file resolved."""
    arguments: TrainingArguments
    """The trainer's config, as changed by the plugins."""
    model: ModelPlan
    """What the stack will do to the model."""
    data: TrainingData
    """The tokenized data."""
    labels: Labels | None = None
    """The classes of labeled data."""

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
    disable_progress_bars()
    load, labels = dict(recipe.load), None
    checked = is_directory(recipe.model)  # a directory was already checked with the recipe
    trainer = check_trainer(recipe)
    if (task := recipe.task or trainer.task) is not None:
        load["auto_class"] = named_task(task).auto_class
    if trainer.task is not None:
        load["num_labels"] = 1
    if recipe.data.format in LABELED:
        if not checked:
            load, checked = check_checkpoint(recipe.model, **load), True
        config = load_config(recipe.model, **only_hub(load))
        trained = task_of(config) is named_task(str(recipe.task))
        known = list((config.id2label or {}).values()) if trained else None
        labels = read_labels(recipe.data, known, getattr(config, "problem_type", None))
        load |= {"config": config, **labels.config()}
    model = plan_model(recipe.model, stack, checked=checked, new_tokens=recipe.data.new_tokens, **load)
    tokenizer, limits = text_tokenizer(model.tokenizer), Limits(positions(model.config), model.embeddings)
    if labels is not None:
        data = load_labeled(recipe.data, tokenizer, labels, seed=arguments.seed, limits=limits)
    elif trainer.task is None and not model.skeleton.can_generate():
        raise ConfigError(
            f"{recipe.model} is a model for {model.task}, but data.format is '{recipe.data.format}'",
            expected="a model that generates text",
            fix="set task and data.format to 'classification' or 'token_classification', or use another model",
        )
    else:
        if recipe.data.chat_template is not None:
            set_template(tokenizer, recipe.data.chat_template)
        _check_padding(tokenizer, model.embeddings)
        data = load_data(
            recipe.data,
            tokenizer,
            seed=arguments.seed,
            keep_end=getattr(arguments, "truncation_mode", "") == "keep_end",
            limits=limits,
            trainer=trainer,
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
    return Run(recipe, arguments, model, data, labels)


def _check_padding(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Pad with the end-of-text token if the model has no embedding for the padding token, which nothing learns from."""
    if rows is not None and tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        logger.warning(
            "the model has %s embeddings and none for the padding token %r (%s): padding with %r",
            *(rows, tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token),
        )
        tokenizer.pad_token = tokenizer.eos_token
