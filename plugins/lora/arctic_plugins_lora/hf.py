"""The adapter in transformers: a ``PeftModel``. Read in peft 0.21.2."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from arctic_plugins_huggingface.adapters import expert_parameters, only_modules, with_frozen_layer
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
        ConfigError: ``target_modules`` names nothing in this model, or ``experts`` are wanted and it has none.
    """
    parameters = expert_parameters(model) if options.experts else []
    if options.experts and not parameters:
        raise ConfigError("plugins.lora.experts is true, but this model has no experts", fix="leave it out")
    targets = options.target_modules if isinstance(options.target_modules, str) else list(options.target_modules)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # PEFT divides it by r, an integer or not
        lora_dropout=options.dropout,
        target_modules=targets,
        target_parameters=parameters or None,
        use_rslora=options.use_rslora,
        task_type="CAUSAL_LM",
    )
    try:
        with only_modules(model, always=options.experts):
            adapted = get_peft_model(model, with_frozen_layer(config))
    except ValueError as error:
        if "not found in the base model" not in str(error) and "No modules were targeted" not in str(error):
            raise
        raise ConfigError(
            f"plugins.lora.target_modules {targets!r} names no module of this model", fix="use 'all-linear'"
        ) from error
    if isinstance(
        config.target_modules, str
    ):  # an expression of the recipe: an adapter's file names modules, which is all that is read from one
        named = set(cast("BaseTuner", adapted.base_model).targeted_module_names)
        config.target_modules = named  # type: ignore[assignment]  # PEFT makes a set of a list itself
    return adapted
