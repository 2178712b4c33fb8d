"""PEFT's tuners over frozen weights: layers that cannot handle encoded bytes never see them. Read in peft 0.21.2.

PEFT treats a :class:`FrozenLinear` as an ``nn.Linear``, from which it derives. While PEFT's layers are created and
while they merge, ``weight`` is the decoded weight, and the result is encoded. While they compute, it is a tensor with a
shape but no values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from peft import LoraConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from arctic_plugins.errors import ConfigError
from arctic_plugins.frozen.linear import FrozenLinear
from arctic_plugins.frozen.module import FrozenModule
from arctic_plugins_huggingface.adapters.lora import BeforeMerge, check_plain, up_first, with_frozen_layer

__all__ = ["OVER_FROZEN", "over_frozen"]

OVER_FROZEN = frozenset(
    {
        "ADALORA",
        "BEFT",
        "BOFT",
        "C3A",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "GRALORA",
        "IA3",
        "LILY",
        "LOHA",
        "LOKR",
        "LORA",
        "MISS",
        "OFT",
        "PSOFT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "TINYLORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    }
)
"""PEFT's tuner types whose layers compute from the output of the base layer, and change its weight only when merging.

``test_tuners.py`` of the lora plugin compares each with PEFT over the decoded weights. Other types read the weight in
every forward pass, or change it when they are created.
"""


@contextmanager
def over_frozen(tuner: BaseTuner, model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Make the layers that ``tuner`` puts over frozen modules of ``model`` leave the encoded bytes alone.

    This applies to layers created in the block.

    Raises:
        ConfigError: the tuner, or one of its options, needs plain weights.
    """
    if not any(isinstance(module, FrozenModule) for module in model.modules()):
        yield
        return
    config, create = tuner.peft_config[adapter_name], tuner._create_and_replace
    _check_copies(model, adapter_name, config)
    if config.peft_type == PeftType.LORA:
        with_frozen_layer(cast("LoraConfig", config))
        up_first(model)

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
        if not isinstance(frozen, FrozenModule):
            create(peft_config, adapter_name, target, target_name, parent, *args, **kwargs)
            return
        _check(adapter_name, peft_config, frozen, kwargs.get("parameter_name"))
        if isinstance(frozen, FrozenLinear):
            is_lora = peft_config.peft_type == PeftType.LORA  # its layers handle frozen ones, and read no weight
            with frozen.as_unread() if is_lora else frozen.as_plain(frozen.decode(frozen.compute_dtype), frozen.bias):
                create(peft_config, adapter_name, target, target_name, parent, *args, **kwargs)
            if not is_lora:
                layer = getattr(parent, target_name)
                kind: Any = type(layer)
                layer.__class__ = _over_frozen(kind)
        else:
            create(peft_config, adapter_name, target, target_name, parent, *args, **kwargs)

    tuner._create_and_replace = create_and_replace  # type: ignore[method-assign]  # only for this tuner, for the time of the block
    try:
        yield
    finally:
        del tuner._create_and_replace


def _check(adapter_name: str, config: Any, frozen: FrozenModule, parameter: str | None) -> None:
    """Raise ConfigError if the adapter cannot be put over ``frozen``, or over its ``parameter``."""
    kind, where = PeftType(config.peft_type).value, f"encoded weights ({next(iter(frozen.frozen.values())).name})"
    if kind == "MISS" and config.init_weights == "bat":
        kind = "MISS with init_weights 'bat'"
    if kind not in OVER_FROZEN:
        raise ConfigError(
            f"adapter '{adapter_name}' is {kind}, which needs the values of {where}",
            expected=f"one of {', '.join(sorted(OVER_FROZEN))}",
            fix="use one of these, or load the weights without encoding them",
        )
    if kind == "LORA":
        check_plain(adapter_name, config)
    if (parameter is not None) == isinstance(frozen, FrozenLinear) or (
        parameter is not None and parameter not in frozen.frozen
    ):
        raise ConfigError(
            f"adapter '{adapter_name}' targets {parameter or 'a whole module'} in {where}",
            expected="linear modules in target_modules and weights of experts in target_parameters",
            fix="correct these options; only LORA adapts experts",
        )


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


@cache
def _over_frozen(kind: Any) -> type:
    """Return a subclass of ``kind``, a layer of PEFT, that works over a :class:`FrozenLinear`.

    It derives from ``kind`` alone, so that the class of an existing layer can be changed to it.
    """
    if hasattr(kind, "_before_merge"):
        return kind

    class OverFrozen(kind):  # type: ignore[misc]
        _before_merge: BeforeMerge | None = None

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.disable_adapters and self.merged:
                self.unmerge()
            if self.disable_adapters or self.merged:
                return super().forward(*args, **kwargs)
            with self.get_base_layer().as_unread():
                return super().forward(*args, **kwargs)

        def get_delta_weight(self, *args: Any, **kwargs: Any) -> Any:
            with self.get_base_layer().as_unread():
                return super().get_delta_weight(*args, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            frozen, already = self.get_base_layer(), list(self.merged_adapters)
            before = BeforeMerge.of(frozen, kept=self._before_merge)
            if self._before_merge is None and frozen.bias is not None:
                before.bias = frozen.bias.detach().clone()
            bias = (
                None if frozen.bias is None else nn.Parameter(frozen.bias.detach().clone().float(), requires_grad=False)
            )
            try:
                with frozen.as_plain(frozen.decode(torch.float32), bias):
                    super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
                    weight, bias = frozen.weight, frozen.bias
                # An unchanged weight is not rounded again.
                if not torch.equal(weight, frozen.decode(torch.float32)):
                    frozen.encode(weight.detach())
            except BaseException:
                self.merged_adapters[:] = already
                raise
            if bias is not None:
                frozen.bias.data = bias.data.to(frozen.bias.dtype)
            if self.merged_adapters != already:
                self._before_merge = before.merged(frozen)

        def unmerge(self) -> None:
            if self._before_merge is not None:
                self._before_merge.give_back(self.get_base_layer())
                self._before_merge = None
            self.merged_adapters.clear()

        def __reduce_ex__(self, protocol: Any) -> Any:
            # pickle finds classes by name, and this class has the name of another.
            return (_again, (kind,), self.__dict__)

    if not hasattr(kind, "get_delta_weight"):  # PEFT checks whether it exists
        del OverFrozen.get_delta_weight
    OverFrozen.__name__, OverFrozen.__qualname__, OverFrozen.__module__ = (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
    )
    return OverFrozen


def _again(kind: Any) -> Any:
    """Return an empty layer of :func:`_over_frozen`, for pickle and copy."""
    found: Any = _over_frozen(kind)
    return found.__new__(found)
