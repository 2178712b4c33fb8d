"""Check everything about a run except the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import disable_progress_bars
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from arctic_plugins.errors import ConfigError
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.files.check import check_checkpoint, is_directory
from arctic_plugins_huggingface.loading.config import load_config, only_hub, text_tokenizer
from arctic_plugins_huggingface.loading.plan import ModelPlan, plan_model
from arctic_plugins_huggingface.loading.rope import positions
from arctic_plugins_huggingface.loading.tasks import named_task, task_of
from arctic_plugins_huggingface.training.arguments import training_arguments
from arctic_plugins_huggingface.training.check import check_recipe
from arctic_plugins_huggingface.training.data import Limits, TrainingData, load_data
from arctic_plugins_huggingface.training.labeled import Labels, load_labeled, read_labels
from arctic_plugins_huggingface.training.recipe import LABELED, Recipe

__all__ = ["Run", "prepare"]


@dataclass(frozen=True)
class Run:
    """A checked recipe with everything that it needs except the weights."""

    recipe: Recipe
    arguments: SFTConfig
    model: ModelPlan
    data: TrainingData
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
    if recipe.task is not None:
        load["auto_class"] = named_task(recipe.task).auto_class
    if recipe.data.format in LABELED:
        if not checked:
            load, checked = check_checkpoint(recipe.model, **load), True
        config = load_config(recipe.model, **only_hub(load))
        trained = task_of(config) is named_task(str(recipe.task))
        known = list((config.id2label or {}).values()) if trained else None
        labels = read_labels(recipe.data, known, getattr(config, "problem_type", None))
        load |= {"config": config, **labels.config()}
    model = plan_model(recipe.model, stack, checked=checked, **load)
    config = model.config
    limits = Limits(positions(config), getattr(config.get_text_config(), "vocab_size", None))
    if labels is not None:
        data = load_labeled(recipe.data, model.tokenizer, labels, seed=arguments.seed, limits=limits)
    elif not model.skeleton.can_generate():
        raise ConfigError(
            f"{recipe.model} is a model for {model.task}, but data.format is '{recipe.data.format}'",
            expected="a model that generates text",
            fix="set task and data.format to 'classification' or 'token_classification', or use another model",
        )
    else:
        data = load_data(
            recipe.data,
            text_tokenizer(model.tokenizer),
            seed=arguments.seed,
            keep_end=arguments.truncation_mode == "keep_end",
            limits=limits,
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
