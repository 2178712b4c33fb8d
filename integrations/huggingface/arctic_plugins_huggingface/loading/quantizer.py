"""The one quantization method of the Hugging Face host, ``arctic``: which module has which codec, whoever wrote the
codec.

``config.json`` says ``quantization_config: {quant_method: arctic, ...}``, read by
:class:`arctic_plugins.frozen.ModuleCodecs`. Every detail of transformers' loader that this file relies on was read in
5.19.0 (``transformers/core_model_loading.py``, ``quantizers/base.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from arctic_plugins.errors import ArcticError, CheckpointError, ConfigError
from arctic_plugins.frozen import METHOD, Codec, ExpertsDispatch, FrozenModule, ModuleCodecs, Placement, PlainCodec
from arctic_plugins_huggingface.adapters.guard import guard_tuners
from arctic_plugins_huggingface.loading.conversions import expert_conversions
from arctic_plugins_huggingface.loading.models import register_models
from arctic_plugins_huggingface.loading.names import stored_codecs, stored_names
from arctic_plugins_huggingface.loading.rope import register_rope_types
from arctic_plugins_huggingface.loading.weights import (
    dispatch_experts,
    freeze_modules,
    frozen_weights,
    thaw_modules,
    weight_specs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ArcticQuantizationConfig", "ArcticQuantizer", "register"]

_OTHER_MODEL = "config.json and weights are of different models: make the checkpoint again"


class ArcticQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint with encoded weights; see :class:`arctic_plugins.frozen.ModuleCodecs`,
    also for the errors raised.

    Args:
        placements: name of :func:`~arctic_plugins_huggingface.loading.weights.weight_specs` -> where its bytes go;
            objects of this process, which :meth:`to_dict` leaves out.
        dispatches: name -> how rows come to its experts; likewise.
        **config: what stands in ``config.json``.
    """

    def __init__(
        self,
        placements: Mapping[str, Placement] | None = None,
        dispatches: Mapping[str, ExpertsDispatch] | None = None,
        **config: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # registered methods are texts, not of the host's enum
        self.codecs = ModuleCodecs.from_config(config)
        self.placements, self.dispatches = dict(placements or {}), dict(dispatches or {})
        self.failure: ArcticError | None = None
        """The first error of an encoding step: the loader collects errors, and raises one that names none."""

    @classmethod
    def from_owners(
        cls,
        owners: Mapping[str, Codec],
        modules: Iterable[str],
        placements: Mapping[str, Placement] | None = None,
        dispatches: Mapping[str, ExpertsDispatch] | None = None,
    ) -> ArcticQuantizationConfig:
        """From a checkpoint's module name -> codec; ``modules`` are the names of all."""
        return cls(placements, dispatches, **ModuleCodecs.from_owners(owners, modules).to_config())

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint says: weights that are only placed, not encoded, are ordinary ones there."""
        encoded = {
            pattern: name
            for pattern, name in self.codecs.modules.items()
            if not isinstance(self.codecs.codecs[name], PlainCodec)
        }
        return ModuleCodecs(
            {name: self.codecs.codecs[name] for name in dict.fromkeys(encoded.values())}, encoded
        ).to_config()


class ArcticQuantizer(HfQuantizer):
    """Encodes while loading a plain checkpoint, and loads encoded checkpoints, one tensor at a time in both cases."""

    requires_calibration = False

    quantization_config: ArcticQuantizationConfig

    def __init__(self, quantization_config: ArcticQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.codecs: dict[str, Codec] = {}
        self.frozen: dict[str, tuple[FrozenModule, str]] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.exported: dict[str, Tensor] = {}
        """Name -> what processes have parts of, whole, while one of these is saving."""

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            # transformers/core_model_loading.py offload_and_maybe_resave_param keeps the unencoded original
            raise ConfigError(
                "device_map puts modules on 'disk' while they are being encoded",
                fix="save an encoded checkpoint with 'arctic quantize', then load that",
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Put frozen modules in place: for an encoded checkpoint with its parameters; for a plain one with the plain
        weights, because the loader casts a tensor to the dtype of the parameter it is for."""
        specs = weight_specs(model)
        self.codecs = stored_codecs(self.quantization_config.codecs, stored_names(model, specs))
        if self.quantization_config.codecs.modules and not self.codecs:
            raise CheckpointError(
                "quantization_config.modules matches no linear module of this model", fix=_OTHER_MODEL
            )
        dispatch_experts(model, self.quantization_config.dispatches)
        freeze_modules(
            model, self.codecs, self.quantization_config.placements, device="meta", until_encoded=not self.pre_quantized
        )
        self.frozen = frozen_weights(model)
        encoded = {
            f"{name.rpartition('.')[0]}.{parameter}"
            for name, parameters in self._parameters()
            for parameter in parameters
        }
        self.shapes = {name: param.shape for name, param in model.named_parameters() if name not in encoded}
        for module, _ in self.frozen.values():
            module._is_hf_initialized = True  # type: ignore[assignment]  # or the loader would draw missing bytes at random, which cannot be done

    def _parameters(self) -> Iterator[tuple[str, list[str]]]:
        """Every encoded weight and the names, in its module, of the parameters with its buffers."""
        for name, (module, leaf) in self.frozen.items():
            yield name, list((module.frozen[leaf].parameters or {"": leaf}).values())

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        return expert_conversions(weight_conversions, self.quantization_config.dispatches.values())

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.frozen and not self.pre_quantized

    def get_quantize_ops(self) -> ConversionOps:
        return _Encode(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, parameters in self._parameters():
            module, leaf = self.frozen[name]
            resident = [parameter for parameter in parameters if parameter in module._parameters]
            missing = [
                parameter
                for parameter in resident
                if not getattr(module._parameters[parameter], "_is_hf_initialized", False)
            ]
            if missing or (module.frozen[leaf].parameters is None and module.frozen[leaf].handle is None):
                raise CheckpointError(
                    f"{name.rpartition('.')[0]}.{(missing or [leaf])[0]} is missing",
                    fix="the checkpoint is incomplete: make it again",
                )
            if (
                self.pre_quantized
            ):  # encoded while loading, the others are held already; hold() compares shapes, which the loader does not
                module.hold(module.export(leaf), leaf)
        for name, param in model.named_parameters():
            if param.shape != self.shapes.get(name, param.shape):
                raise CheckpointError(
                    f"{name} has shape {tuple(param.shape)}", expected=f"{tuple(self.shapes[name])}", fix=_OTHER_MODEL
                )
        self.frozen = {}  # the quantizer stays with the model, and modules may be replaced
        return model

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        if not self.pre_quantized and (found := self.frozen.get(param_name)) is not None:
            weight = found[0].frozen[found[1]]
            return weight.codec.nbytes(weight.shape) / param.numel()
        return param.element_size()

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        placed = {
            name: (module, leaf)
            for name, (module, leaf) in frozen_weights(model).items()
            if module.frozen[leaf].handle is not None
        }
        if not placed and not self.exported:
            return None, {}
        state = {**model.state_dict(), **self.exported}
        for name, (module, leaf) in placed.items():
            if name not in self.exported:
                state.update({f"{name}{suffix}": buffer for suffix, buffer in module.export(leaf).items()})
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        thaw_modules(
            model, getattr(torch, dtype) if isinstance(dtype, str) else dtype
        )  # a text once the model has been saved
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
    """Loader step: one weight in the model's dtype comes in, its frozen module takes it, and the loader is told that it
    is done.
    """

    def __init__(self, quantizer: ArcticQuantizer) -> None:
        self.quantizer = quantizer

    # The host always says full_layer_name, and takes tensors as well as lists of them.
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        module, leaf = self.quantizer.frozen[full_layer_name]
        try:
            module.encode(value[0] if isinstance(value, list) else value, leaf)
        except ArcticError as error:
            self.quantizer.quantization_config.failure = self.quantizer.quantization_config.failure or error
            raise
        for parameter in {leaf, *(module.frozen[leaf].parameters or {}).values()} & module._parameters.keys():
            module._parameters[parameter]._is_hf_initialized = True  # type: ignore[union-attr]  # or the loader would draw it at random
        return {full_layer_name: module._parameters[leaf]}  # type: ignore[dict-item]


def register() -> None:
    """Make transformers know the method ``arctic``, so that ``from_pretrained`` reads encoded checkpoints, and what
    installed plugins add: models that it does not have, experts functions, RoPE types. PEFT's adapters know frozen
    modules from then on. Idempotent.

    :func:`~arctic_plugins_huggingface.load_model` calls it. Without it transformers refuses such a checkpoint: the
    encoded weights do not have the shapes that the model declares.
    """
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(ArcticQuantizationConfig)
        register_quantizer(METHOD)(ArcticQuantizer)
        register_models()
        register_rope_types()
        guard_tuners()
