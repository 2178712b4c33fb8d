"""LoRA over frozen weights: the one PEFT layer that merges into the bytes of any codec. Read in peft 0.21.2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import transformers_weight_conversion
from safetensors import safe_open
from torch import Tensor, nn

from arctic_plugins.errors import ArcticError, CheckpointError, ConfigError
from arctic_plugins.frozen.experts import FrozenExperts
from arctic_plugins.frozen.linear import FrozenLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FrozenLoraLinear", "load_adapter", "only_modules", "with_frozen_layer"]


class FrozenLoraLinear(LoraLinear):
    """A LoRA layer over a :class:`FrozenLinear`. PEFT's own would add floats to bytes when it merges.

    Merging decodes, adds the update in float32 and encodes again with the same codec. The bytes from before are kept until the layer is unloaded,
    so that unmerging gives them back exactly.
    """

    _bytes_before_merge: dict[str, Tensor] | None = None

    def __init__(self, base_layer: FrozenLinear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if config.use_dora or config.lora_bias:
            variant = "DoRA" if config.use_dora else "lora_bias"
            raise ConfigError(
                f"adapter '{adapter_name}' uses {variant} over encoded weights", expected="plain LoRA or rsLoRA", fix="train a plain adapter"
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As in PEFT; NaN and Inf are refused by the codec, whatever ``safe_merge`` says."""
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not adapters:
            return
        frozen = self.get_base_layer()
        before = frozen.export()
        merged = frozen.decode(torch.float32)
        for name in adapters:
            merged += self.get_delta_weight(name).to(merged)
        frozen.encode(merged)
        if self._bytes_before_merge is None:
            self._bytes_before_merge = before
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Give back the bytes from before the first merge; undoes all merged adapters at once."""
        if self._bytes_before_merge is not None:
            self.get_base_layer().hold(self._bytes_before_merge)
            self._bytes_before_merge = None
        self.merged_adapters.clear()


@contextmanager
def only_modules(model: nn.Module) -> Iterator[None]:
    """While this lasts, PEFT adapts no fused parameters of a ``model`` with encoded experts.

    PEFT (utils/transformers_weight_conversion.py) takes 'all-linear', and names like ``gate_proj``, in mixtures of experts for the fused
    parameters that hold what had these names in transformers 4, and wraps them. Bytes cannot be wrapped.
    """
    if not any(isinstance(module, FrozenExperts) for module in model.modules()):
        yield
        return
    stock = transformers_weight_conversion.convert_peft_config_for_transformers
    transformers_weight_conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = stock


def with_frozen_layer(config: LoraConfig) -> LoraConfig:
    """Make PEFT use :class:`FrozenLoraLinear` where the base layer is frozen. It is not saved with the adapter, so do it on every load."""
    config._register_custom_module({FrozenLinear: FrozenLoraLinear})
    return config


def load_adapter(model: PreTrainedModel, adapter: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put the PEFT LoRA adapter in the directory ``adapter`` on ``model``, ready to be merged whatever its codec.

    Raises:
        CheckpointError: it does not fit the model, or lacks a tensor (of which PEFT only warns).
    """
    try:
        config = LoraConfig.from_pretrained(str(adapter))
        with only_modules(model):
            adapted = PeftModel.from_pretrained(model, str(adapter), config=with_frozen_layer(config), is_trainable=trainable)
        with safe_open(Path(adapter) / "adapter_model.safetensors", "pt") as file:
            saved = set(file.keys())
    except ArcticError:
        raise
    except Exception as error:  # what a damaged file does to PEFT can be anything
        text = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"{adapter} cannot be put on its base model: {type(error).__name__}: {text}", fix="it is damaged or of another model: train it again"
        ) from error
    if missing := get_peft_model_state_dict(adapted).keys() - saved:
        raise CheckpointError(f"{adapter} lacks {len(missing)} tensors, {min(missing)} for one", fix="the adapter is incomplete: save it again")
    return adapted
