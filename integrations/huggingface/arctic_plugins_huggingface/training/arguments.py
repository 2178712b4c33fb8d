"""Build the Trainer's arguments from a recipe."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any, cast, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from arctic_plugins.compute import is_native, warning_for
from arctic_plugins.errors import ConfigError, one_line
from arctic_plugins_huggingface.training.check import check_arguments, check_trainer
from arctic_plugins_huggingface.training.liger import check_liger
from arctic_plugins_huggingface.training.recipe import Recipe

logger = logging.getLogger(__name__)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Return the recipe's ``training`` as the config of its trainer, which extends ``TrainingArguments``.

    Raises:
        ConfigError: if a key is unknown (the nearest known one is named) or belongs under ``data``, or if the library
            rejects a value.
    """
    trainer = check_trainer(recipe)
    _, config_class = trainer.load()
    hints = get_type_hints(config_class)
    given = check_arguments(
        recipe.arguments, {field.name: hints[field.name] for field in fields(config_class) if field.init}
    )
    data = recipe.data
    evaluates = data.eval_path or data.eval_split or data.eval_size
    native = is_native(torch.bfloat16, "cpu" if given.get("use_cpu") else None)
    defaults: dict[str, Any] = {
        "report_to": "none",
        "bf16": native and not given.get("fp16"),  # TRL's configs turn it on regardless of the device
        "gradient_checkpointing": False,  # as in TrainingArguments; TRL's configs turn it on
        # transformers trains in bfloat16 without a GPU only if this is set
        "use_cpu": not torch.accelerator.is_available(),
        "include_num_input_tokens_seen": "non_padding",
        # every adapter is used in every step; the default searches for unused ones in each step
        "ddp_find_unused_parameters": False,
        "eval_strategy": ("steps" if "eval_steps" in given else "epoch") if evaluates else "no",
    }
    ours: dict[str, Any] = {"max_length": data.max_length}
    if not trainer.preference:
        defaults["packing_strategy"] = "bfd_split" if data.splits else "bfd"
        ours |= {"packing": data.packing, "eval_packing": False}
    try:
        arguments = config_class(**{**defaults, **trainer.defaults, **ours, **given})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(
            f"training is not valid: {one_line(error)}", fix="correct the value, or install the package that it names"
        ) from error
    check_liger(arguments)
    reported = cast("list[str]", arguments.report_to)  # after __post_init__ has normalized it
    if absent := sorted({*reported} & INTEGRATION_TO_CALLBACK.keys() - {*get_available_reporting_integrations()}):
        raise ConfigError(
            f"training.report_to names integrations that are not installed: {', '.join(absent)}",
            fix=f"run 'pip install {' '.join(absent)}', or leave it out",
        )
    for key in ("bf16", "bf16_full_eval", "fp16", "fp16_full_eval"):
        if given.get(key):
            dtype = torch.bfloat16 if key.startswith("bf16") else torch.float16
            if line := warning_for(dtype, f"training.{key}", "leave it out", "cpu" if arguments.use_cpu else None):
                logger.warning(line)
    return arguments
