"""The one quantization method of the Hugging Face host, ``arctic``: which module has which codec, whoever wrote the codec.

``config.json`` says ``quantization_config: {quant_method: arctic, ...}``, read by :class:`arctic_plugins.frozen.ModuleCodecs`. Every
detail of transformers' loader that this file relies on was read in 5.19.0 (``transformers/core_model_loading.py``, ``quantizers/base.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from arctic_plugins.errors import ArcticError, CheckpointError, ConfigError
from arctic_plugins.frozen import METHOD, Codec, FrozenLinear, ModuleCodecs, Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ArcticQuantizationConfig", "ArcticQuantizer", "register"]

_OTHER_MODEL = "config.json and weights are of different models: make the checkpoint again"


class ArcticQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint with encoded weights; see :class:`arctic_plugins.frozen.ModuleCodecs`, also for the errors raised.

    Args:
        placements: module name -> where its bytes go; objects of this process, which :meth:`to_dict` leaves out.
        **config: what stands in ``config.json``.
    """

    def __init__(self, placements: Mapping[str, Placement] | None = None, **config: Any) -> None:
        self.quant_method = METHOD
        self.codecs = ModuleCodecs.from_config(config)
        self.placements = dict(placements or {})
        self.failure: ArcticError | None = None
        """The first error of an encoding step: the loader collects errors, and raises one that names none."""

    @classmethod
    def from_owners(
        cls, owners: Mapping[str, Codec], modules: Iterable[str], placements: Mapping[str, Placement] | None = None
    ) -> ArcticQuantizationConfig:
        """From module name -> codec; ``modules`` are the names of all linear modules."""
        return cls(placements, **ModuleCodecs.from_owners(owners, modules).to_config())

    def to_dict(self) -> dict[str, Any]:
        return self.codecs.to_config()


class ArcticQuantizer(HfQuantizer):
    """Encodes while loading a plain checkpoint, and loads encoded checkpoints, one tensor at a time in both cases."""

    requires_calibration = False

    quantization_config: ArcticQuantizationConfig

    def __init__(self, quantization_config: ArcticQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.codecs: dict[str, Codec] = {}
        self.shapes: dict[str, torch.Size] = {}

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            # transformers/core_model_loading.py offload_and_maybe_resave_param keeps the unencoded original
            raise ConfigError(
                "device_map puts modules on 'disk' while they are being encoded",
                fix="save an encoded checkpoint with 'arctic quantize', then load that",
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Decide who gets a codec. Modules of an encoded checkpoint become frozen now, so that the loader sees their parameters; those of a plain
        one become frozen when their weight arrives, because the loader casts a tensor to the dtype of the parameter it is for."""
        linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        self.codecs = {name: codec for name in linears if (codec := self.quantization_config.codecs.codec_of(name))}
        if self.quantization_config.codecs.modules and not self.codecs:
            raise CheckpointError("quantization_config.modules matches no linear module of this model", fix=_OTHER_MODEL)
        self.shapes = {name: param.shape for name, param in model.named_parameters() if name.removesuffix(".weight") not in self.codecs}
        if self.pre_quantized:
            for name in self.codecs:
                frozen = self.freeze(linears[name], name, device="meta")
                frozen._is_hf_initialized = True  # type: ignore[assignment]  # or the loader would draw missing bytes at random, which cannot be done
                model.set_submodule(name, frozen)

    def freeze(self, linear: nn.Linear, name: str, *, device: torch.device | str | None = None) -> FrozenLinear:
        """The empty frozen layer that takes the place of ``linear``."""
        placement = self.quantization_config.placements.get(name)
        return FrozenLinear.from_linear(linear, self.codecs[name], device=device, name=name, placement=placement)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and module in self.codecs and not self.pre_quantized

    def get_quantize_ops(self) -> ConversionOps:
        return _Encode(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name in self.codecs:
            module = model.get_submodule(name)
            missing = [leaf for leaf, param in module.named_parameters(recurse=False) if not getattr(param, "_is_hf_initialized", False)]
            if missing or not isinstance(module, FrozenLinear):
                raise CheckpointError(f"{name}.{(missing or ['weight'])[0]} is missing", fix="the checkpoint is incomplete: make it again")
            if self.pre_quantized:  # encoded while loading, the others are held already; hold() compares shapes, which the loader does not
                module.hold(module.export())
        for name, param in model.named_parameters():
            if param.shape != self.shapes.get(name, param.shape):
                raise CheckpointError(f"{name} has shape {tuple(param.shape)}", expected=f"{tuple(self.shapes[name])}", fix=_OTHER_MODEL)
        return model

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        module, _, leaf = param_name.rpartition(".")
        if leaf == "weight" and (codec := self.codecs.get(module)) is not None and not self.pre_quantized:
            return codec.nbytes(tuple(param.shape)) / param.numel()
        return param.element_size()

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        placed = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear) and module.handle is not None}
        if not placed:
            return None, {}
        state = model.state_dict()
        for name, module in placed.items():
            state.update({f"{name}.weight{suffix}": buffer for suffix, buffer in module.export().items()})
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, FrozenLinear):
                model.set_submodule(name, module.to_linear(dtype))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # with an adapter: the Trainer refuses a quantized model without one

    @property
    def is_compileable(self) -> bool:
        return True


class _Encode(ConversionOps):
    """Loader step: one weight in the model's dtype comes in, its module becomes frozen, and the loader is told that it is done."""

    def __init__(self, quantizer: ArcticQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, model: PreTrainedModel, **kwargs: Any) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        name = full_layer_name.removesuffix(".weight")
        frozen = self.quantizer.freeze(model.get_submodule(name), name, device=weight.device)
        try:
            frozen.encode(weight)
        except ArcticError as error:
            self.quantizer.quantization_config.failure = self.quantizer.quantization_config.failure or error
            raise
        for param_name, param in frozen.named_parameters(recurse=False):
            if param_name.startswith("weight"):
                param._is_hf_initialized = True  # type: ignore[attr-defined]  # or the loader would draw it at random
        model.set_submodule(name, frozen)
        return {full_layer_name: frozen.weight}


def register() -> None:
    """Make transformers know the method ``arctic``, so that ``from_pretrained`` reads encoded checkpoints. Idempotent.

    :func:`~arctic_plugins_huggingface.load_model` calls it. Without it transformers refuses such a checkpoint: the encoded weights do not have
    the shapes that the model declares.
    """
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(ArcticQuantizationConfig)
        register_quantizer(METHOD)(ArcticQuantizer)
