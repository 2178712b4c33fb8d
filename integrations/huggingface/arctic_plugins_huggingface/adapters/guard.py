"""The patches of PEFT: :mod:`arctic_plugins_huggingface.adapters.tuners` creates adapters over frozen modules.

Read in peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from arctic_plugins.errors import ConfigError
from arctic_plugins.patches import patch_when_imported

__all__ = ["guard_tuners"]

_MODULE = "peft.tuners.tuners_utils"


def guard_tuners() -> None:
    """Make PEFT create all adapters within :func:`arctic_plugins_huggingface.adapters.tuners.over_frozen`.

    PEFT is patched now, or when it is imported. All tuners that put layers into a model do so in
    ``BaseTuner.inject_adapter``; some look at the weights before and after that, in ``BaseTuner.__init__``. Models
    without frozen modules are left to PEFT alone.
    """
    why = "PEFT's layers cannot handle the bytes of frozen modules, and it accepts other layers only for LoRA"
    tuners: Mapping[str, Any] = {"inject_adapter": _inject_adapter, "__init__": _init}
    for name, function in tuners.items():
        patch_when_imported(_MODULE, "BaseTuner", name, why=why, read_in="peft 0.21.2")(function)
    why = "it reads the weights of modules from outside PEFT's layers"
    others: Mapping[tuple[str, str], Any] = {
        ("peft.tuners.lora.corda", "target_modules"): _target_modules,
        ("peft.tuners.lora.corda", "collect_eigens_for_layer"): _with_decoded_weights,
        ("peft.tuners.lora.conversion", "_convert_module_to_lora"): _with_decoded_weights,
        ("peft.tuners.lora.loraga", "estimate_gradients"): _estimate_gradients,
    }
    for (module, name), function in others.items():
        patch_when_imported(module, None, name, why=why, read_in="peft 0.21.2")(function)


def _inject_adapter(stock: Any, self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    from arctic_plugins_huggingface.adapters.tuners import over_frozen

    with over_frozen(self, model, adapter_name):
        stock(self, model, adapter_name, *args, **kwargs)


def _init(stock: Any, self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    _with_decoded_weights(lambda *args, **kwargs: stock(self, *args, **kwargs), model, *args, **kwargs)


def _with_decoded_weights(stock: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``stock`` with a model or module whose encoded weights look decoded."""
    from arctic_plugins_huggingface.adapters.tuners import decoded_weights

    with decoded_weights(model):
        return stock(model, *args, **kwargs)


def _target_modules(stock: Any, model: Any, config: Any) -> Iterator[tuple[str, Any]]:
    from arctic_plugins_huggingface.adapters.tuners import decoded_weights

    for name, module in stock(model, config):
        with decoded_weights(module):
            yield name, module


def _estimate_gradients(stock: Any, model: Any, lora_config: Any, train_step: Any) -> None:
    from arctic_plugins.frozen.module import FrozenModule

    for name, module in model.named_modules():
        if isinstance(module, FrozenModule):
            raise ConfigError(
                f"LoRA-GA needs gradients of the base weights, and {name} is encoded",
                expected="an initialization without gradients",
                fix="use init_lora_weights='eva' or 'corda', or load plain weights",
            )
    stock(model, lora_config, train_step)
