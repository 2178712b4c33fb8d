"""The adapter in transformers, a ``PeftModel``. Read in peft 0.21.2."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from arctic_plugins_huggingface.adapters import expert_parameters, only_modules, with_frozen_layer
from arctic_plugins_huggingface.loading import head_modules, pretrained_part, task_of_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from arctic_plugins.errors import ConfigError
from arctic_plugins_lora.config import LoraOptions

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import PreTrainedModel

__all__ = ["add_adapter"]


def add_adapter(model: PreTrainedModel, options: LoraOptions) -> PeftModel:
    """Wrap ``model`` in a ``PeftModel`` with a new, trainable adapter; everything else is frozen, except a task's head.

    Raises:
        ConfigError: ``target_modules`` matches no module of the model, or ``experts`` is true and it has no experts.
    """
    parameters = expert_parameters(model) if options.experts else []
    if options.experts and not parameters:
        raise ConfigError("plugins.lora.experts is true, but this model has no experts", fix="leave the option out")
    targets = options.target_modules if isinstance(options.target_modules, str) else list(options.target_modules)
    task = task_of_model(model)
    if targets == "all-linear" and task is not None and task.name == "image-text-to-text":
        targets = _language_modules(model)  # PEFT would also adapt what reads images
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # PEFT only divides it by r; it need not be an integer
        lora_dropout=options.dropout,
        target_modules=targets,
        target_parameters=parameters or None,
        use_rslora=options.use_rslora,
        task_type="CAUSAL_LM" if task is None else task.peft,
        modules_to_save=head_modules(model) or None,
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
    return adapted


def _language_modules(model: PreTrainedModel) -> list[str]:
    """Return the linear modules of the language model, except the output head."""
    is_part, head = pretrained_part(model), model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and is_part(name)
    ]
