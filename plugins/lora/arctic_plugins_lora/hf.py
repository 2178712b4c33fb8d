"""The adapter in transformers, a ``PeftModel``. Read in peft 0.21.2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from arctic_plugins_huggingface.adapters import expert_parameters, new_token_rows, only_modules, prepare_new_rows
from arctic_plugins_huggingface.loading import head_modules, pretrained_part, task_of_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from arctic_plugins.errors import ConfigError
from arctic_plugins_lora.config import CALLED, LoraOptions

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import PreTrainedModel

__all__ = ["add_adapter"]


def add_adapter(model: PreTrainedModel, options: LoraOptions) -> PeftModel:
    """Wrap ``model`` in a ``PeftModel`` with a new, trainable adapter; everything else is frozen, except a task's head.

    Raises:
        ConfigError: ``target_modules`` matches no module of the model; ``experts`` is true and it has no experts;
            ``lora_bias`` is true and a module has no bias to merge it into; or PEFT refuses the model or the options.
    """
    parameters = expert_parameters(model) if options.experts else []
    if options.experts and not parameters:
        raise ConfigError("plugins.lora.experts is true, but this model has no experts", fix="leave the option out")
    given = options.model_dump(mode="json", exclude={"experts"}, exclude_none=True)  # lists, as PEFT expects
    if parameters:
        given["target_parameters"] = parameters
    task = task_of_model(model)
    if given["target_modules"] == "all-linear" and task is not None and task.name == "image-text-to-text":
        given["target_modules"] = _language_modules(model)  # PEFT would also adapt what reads images
    if head := head_modules(model):
        given["modules_to_save"] = [*dict.fromkeys([*head, *(options.modules_to_save or ())])]
    rows = new_token_rows(model)
    if rows and (tokens := _tokens(rows, options)):
        given["trainable_token_indices"] = tokens
    for peft_name, name in CALLED.items():
        given[peft_name] = given.pop(name)
    try:
        config = LoraConfig(task_type="CAUSAL_LM" if task is None else task.peft, **given)
        with only_modules(model, always="target_parameters" in given):
            # On the meta device, the model is only planned, and so is the adapter.
            adapted = get_peft_model(model, config, low_cpu_mem_usage=model.device.type == "meta")
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise _refused(error, options) from error
    if options.lora_bias:
        _check_biases(adapted)
    if options.trainable_token_indices is not None and options.modules_to_save is not None:
        _check_tokens(adapted)
    if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
        # A regular expression in the recipe; the adapter's file lists names instead, the only form that is read back.
        named = set(cast("BaseTuner", adapted.base_model).targeted_module_names)
        config.target_modules = named  # type: ignore[assignment]  # PEFT itself converts a list to a set
        config.exclude_modules = None
    return prepare_new_rows(adapted) if rows else adapted


def _tokens(rows: dict[str, list[int]], options: LoraOptions) -> dict[str, list[int]]:
    """Return the rows to train: those of new tokens, and those that the recipe names.

    Modules that are trained as a whole (``modules_to_save``) are left out.
    """
    given: Any = options.trainable_token_indices or {}
    if not isinstance(given, dict):  # of the embedding
        given = {next(iter(rows)): given}
    found = {name: {*tokens} for name, tokens in rows.items()}
    for key, tokens in given.items():
        name = next((name for name in rows if f".{name}".endswith(f".{key}")), key)
        found[name] = found.get(name, set()) | {*tokens}
    whole = options.modules_to_save or ()
    return {
        name: sorted(tokens)
        for name, tokens in found.items()
        if not any(f".{name}".endswith(f".{part}") for part in whole)
    }


def _refused(error: Exception, options: LoraOptions) -> ConfigError:
    """Return PEFT's refusal as an error of the recipe."""
    text = str(error)
    if "not found in the base model" in text or "No modules were targeted" in text:
        targets: Any = options.target_modules
        targets = targets if isinstance(targets, str) else list(targets)
        return ConfigError(
            f"plugins.lora.target_modules {targets!r} matches no module of this model", fix="use 'all-linear'"
        )
    return ConfigError(
        f"PEFT refuses this adapter for this model: {' '.join(text.split())}",
        fix="change the options under plugins.lora, or choose another model",
    )


def _check_biases(model: PeftModel) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and getattr(module.get_base_layer(), "bias", None) is None:
            name = name.removeprefix("base_model.model.")
            raise ConfigError(
                f"plugins.lora.lora_bias is true, but {name} has no bias to merge into",
                fix="leave the option out, or target only modules with a bias",
            )


def _check_tokens(model: PeftModel) -> None:
    """Raise ConfigError if tokens and the whole of one weight are trained, which PEFT notices in the forward pass."""
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper) and any(
            isinstance(part, ModulesToSaveWrapper) for part in module.modules()
        ):
            name = name.removeprefix("base_model.model.")
            raise ConfigError(
                f"plugins.lora.trainable_token_indices and modules_to_save both train {name}, or a weight tied to it",
                fix="leave one of the two out",
            )


def _language_modules(model: PreTrainedModel) -> list[str]:
    """Return the linear modules of the language model, except the output head."""
    is_part, head = pretrained_part(model), model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and is_part(name)
    ]
