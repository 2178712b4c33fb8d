"""The adapter in transformers, a ``PeftModel``. Read in peft 0.21.2."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from arctic_plugins_huggingface.adapters import (
    expert_parameters,
    new_token_rows,
    only_modules,
    prepare_new_rows,
    with_frozen_layer,
)
from peft import LoraConfig, PeftModel, get_peft_model

from arctic_plugins.errors import ConfigError
from arctic_plugins_lora.config import LoraOptions

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import PreTrainedModel

__all__ = ["add_adapter"]


def add_adapter(model: PreTrainedModel, options: LoraOptions) -> PeftModel:
    """Wrap ``model`` in a ``PeftModel`` with a new, trainable adapter; everything else is frozen.

    Raises:
        ConfigError: ``target_modules`` matches no module of the model, or ``experts`` is true and it has no experts.
    """
    parameters = expert_parameters(model) if options.experts else []
    if options.experts and not parameters:
        raise ConfigError("plugins.lora.experts is true, but this model has no experts", fix="leave the option out")
    targets = options.target_modules if isinstance(options.target_modules, str) else list(options.target_modules)
    rows = new_token_rows(model)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # PEFT only divides it by r; it need not be an integer
        lora_dropout=options.dropout,
        target_modules=targets,
        target_parameters=parameters or None,
        use_rslora=options.use_rslora,
        trainable_token_indices=rows or None,
        task_type="CAUSAL_LM",
    )
    try:
        with only_modules(model, always=options.experts):
            adapted = get_peft_model(model, with_frozen_layer(config))
    except ValueError as error:
        if "not found in the base model" not in str(error) and "No modules were targeted" not in str(error):
            raise
        raise ConfigError(
            f"plugins.lora.target_modules {targets!r} matches no module of this model", fix="use 'all-linear'"
        ) from error
    if isinstance(
        config.target_modules, str
    ):  # a regular expression in the recipe; the adapter's file lists names instead, the only form that is read back
        named = set(cast("BaseTuner", adapted.base_model).targeted_module_names)
        config.target_modules = named  # type: ignore[assignment]  # PEFT itself converts a list to a set
    return prepare_new_rows(adapted) if rows else adapted
