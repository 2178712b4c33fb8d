"""PEFT's tuners over frozen weights: layers never see encoded bytes. Read in peft 0.21.2.

PEFT treats a :class:`FrozenLinear` as the ``nn.Linear`` from which it derives. While PEFT puts its layers into a model,
frozen modules have a decoded ``weight``, decoded where PEFT reads it. If PEFT changes it, as some initializations of
LoRA do, the result is encoded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from arctic_plugins.errors import ConfigError
from arctic_plugins.frozen.linear import DecodedWeight, FrozenLinear
from arctic_plugins.frozen.module import FrozenModule
from arctic_plugins_huggingface.adapters.layers import over_frozen_layer
from arctic_plugins_huggingface.adapters.lora import check_experts, up_first, with_frozen_experts

__all__ = ["decoded_weights", "over_frozen"]

_log = logging.getLogger(__name__)

_TRAIN_WEIGHTS = frozenset({"LN_TUNING", "TRAINABLE_TOKENS"})
"""Tuner types that train a copy of what they target."""


@contextmanager
def decoded_weights(model: nn.Module) -> Iterator[None]:
    """Give the encoded linear modules of ``model`` a decoded ``weight``, decoded where it is read, in the block."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, FrozenLinear):
                stack.enter_context(module.as_decoded())
        yield


@contextmanager
def over_frozen(tuner: BaseTuner, model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Make the layers that ``tuner`` puts over frozen modules of ``model`` leave the encoded bytes alone.

    This applies to layers created in the block.

    Raises:
        ConfigError: the tuner, or one of its options, cannot work over encoded weights.
    """
    if not any(isinstance(module, FrozenModule) for module in model.modules()):
        yield
        return
    config, create = tuner.peft_config[adapter_name], tuner._create_and_replace
    _check_copies(model, adapter_name, config)
    if config.peft_type == PeftType.LORA:
        with_frozen_experts(cast("LoraConfig", config))
        up_first(model)
    changed: list[str] = []

    def create_and_replace(
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        frozen = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(frozen, FrozenModule):
            _check(adapter_name, peft_config, frozen, kwargs.get("parameter_name"))
        if not isinstance(frozen, FrozenLinear):
            create(peft_config, adapter_name, target, target_name, parent, *args, **kwargs)
            return
        weight = DecodedWeight.of(frozen, keep=True)
        with frozen.as_plain(weight, frozen.bias):
            create(peft_config, adapter_name, target, target_name, parent, *args, **kwargs)
            now: Any = frozen.weight
        if isinstance(now, DecodedWeight):
            now = now.value
        if now is not None and not now.is_meta and not torch.equal(now, frozen.decode(now.dtype)):
            frozen.encode(now.detach())
            changed.append(frozen.frozen["weight"].name)
        layer = getattr(parent, target_name)
        if isinstance(layer, BaseTunerLayer):
            layer.__class__ = over_frozen_layer(type(layer))

    tuner._create_and_replace = create_and_replace  # type: ignore[method-assign]  # only for this tuner, for the time of the block
    try:
        with decoded_weights(model):
            yield
    finally:
        del tuner._create_and_replace
    if changed:
        _log.warning(
            "The initialization of adapter '%s' changed %d encoded weights, for example %s: the adapter fits these, "
            "not those of the checkpoint. Save it with path_initial_model_for_weight_conversion, or save the model too",
            adapter_name,
            len(changed),
            changed[0],
        )


def _check(adapter_name: str, config: Any, frozen: FrozenModule, parameter: str | None) -> None:
    """Raise ConfigError if the adapter cannot be put over ``frozen``, or over its ``parameter``."""
    kind, where = PeftType(config.peft_type).value, f"encoded weights ({next(iter(frozen.frozen.values())).name})"
    if kind in _TRAIN_WEIGHTS:
        raise ConfigError(
            f"adapter '{adapter_name}' is {kind}, which trains a copy of {where}",
            expected="plain modules in target_modules",
            fix="exclude these modules from the codec, or train another kind of adapter",
        )
    if (parameter is not None) == isinstance(frozen, FrozenLinear) or (
        parameter is not None and parameter not in frozen.frozen
    ):
        raise ConfigError(
            f"adapter '{adapter_name}' targets {parameter or 'a whole module'} in {where}",
            expected="linear modules in target_modules and weights of experts in target_parameters",
            fix="correct these options; only LORA adapts experts",
        )
    if parameter is not None:
        check_experts(adapter_name, config)


def _check_copies(model: nn.Module, adapter_name: str, config: Any) -> None:
    """Raise ConfigError if PEFT would train a copy of encoded weights."""
    tokens = getattr(config, "trainable_token_indices", None)
    wanted = [*(getattr(config, "modules_to_save", None) or ()), *(tokens if isinstance(tokens, dict) else ())]
    for name, module in model.named_modules() if wanted else ():
        if name.endswith(tuple(wanted)) and any(isinstance(part, FrozenModule) for part in module.modules()):
            raise ConfigError(
                f"adapter '{adapter_name}' trains a copy of {name}, which is encoded",
                expected="plain modules in modules_to_save and trainable_token_indices",
                fix="exclude the module from the codec, or remove it from these options",
            )
