"""``arctic``, the only quantization method of the Hugging Face host: which module has which codec, of any plugin.

``config.json`` contains ``quantization_config: {quant_method: arctic, ...}``, which
:class:`arctic_plugins.frozen.ModuleCodecs` reads. All details of transformers' loader that this file relies on were
read in 5.19.0 (``transformers/core_model_loading.py``, ``quantizers/base.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from arctic_plugins.errors import ArcticError, CheckpointError, ConfigError
from arctic_plugins.frozen import METHOD, Codec, ExpertsDispatch, FrozenModule, ModuleCodecs, Placement, PlainCodec
from arctic_plugins.frozen.codec import check_buffers
from arctic_plugins.patches import patch
from arctic_plugins_huggingface.adapters.guard import guard_tuners
from arctic_plugins_huggingface.loading.conversions import expert_conversions
from arctic_plugins_huggingface.loading.models import register_models
from arctic_plugins_huggingface.loading.names import in_checkpoint, stored_codecs, stored_names
from arctic_plugins_huggingface.loading.rope import register_rope_types
from arctic_plugins_huggingface.loading.weights import (
    dispatch_experts,
    freeze_modules,
    frozen_weights,
    thaw_modules,
    weight_specs,
)

__all__ = ["ArcticQuantizationConfig", "ArcticQuantizer", "register"]

_OTHER_MODEL = "config.json and the weights belong to different models: create the checkpoint again"


class ArcticQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint with encoded weights.

    See :class:`arctic_plugins.frozen.ModuleCodecs`, also for the errors raised.

    Args:
        placements: name of :func:`~arctic_plugins_huggingface.loading.weights.weight_specs` -> where its bytes go.
            These are objects of this process, and :meth:`to_dict` leaves them out.
        dispatches: name -> how rows reach its experts; also left out by :meth:`to_dict`.
        **config: the content of ``quantization_config`` in ``config.json``.
    """

    def __init__(
        self,
        placements: Mapping[str, Placement] | None = None,
        dispatches: Mapping[str, ExpertsDispatch] | None = None,
        **config: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # registered methods are strings, not enum members
        self.codecs = ModuleCodecs.from_config(config)
        self.placements, self.dispatches = dict(placements or {}), dict(dispatches or {})
        self.failure: Exception | None = None
        """The first error of an encoding step: the loader collects errors and raises one that names none of them."""

    @classmethod
    def from_owners(
        cls,
        owners: Mapping[str, Codec],
        modules: Iterable[str],
        placements: Mapping[str, Placement] | None = None,
        dispatches: Mapping[str, ExpertsDispatch] | None = None,
    ) -> ArcticQuantizationConfig:
        """Create a config from checkpoint module name -> codec; ``modules`` are the names of all modules."""
        return cls(placements, dispatches, **ModuleCodecs.from_owners(owners, modules).to_config())

    def to_dict(self) -> dict[str, Any]:
        """Return the dict to store in a checkpoint, where weights that are placed but not encoded are ordinary ones."""
        encoded = {
            pattern: name
            for pattern, name in self.codecs.modules.items()
            if not isinstance(self.codecs.codecs[name], PlainCodec)
        }
        return ModuleCodecs(
            {name: self.codecs.codecs[name] for name in dict.fromkeys(encoded.values())}, encoded
        ).to_config()


class ArcticQuantizer(HfQuantizer):
    """Quantizer that encodes plain checkpoints while loading them, and loads encoded ones, one tensor at a time."""

    requires_calibration = False

    quantization_config: ArcticQuantizationConfig

    def __init__(self, quantization_config: ArcticQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.codecs: dict[str, Codec] = {}
        self.frozen: dict[str, tuple[FrozenModule, str]] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.exported: dict[str, Tensor] = {}
        """Name -> a gathered tensor of which each process holds a part, while the model is being saved."""

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        if not isinstance(device_map, dict) or "disk" not in device_map.values():
            return
        if not self.pre_quantized:
            # offload_and_maybe_resave_param in transformers/core_model_loading.py keeps the original, plain weight
            raise ConfigError(
                "device_map puts modules on 'disk' while they are being encoded",
                fix="save an encoded checkpoint with 'arctic quantize', then load it",
            )
        if self.quantization_config.placements:
            raise ConfigError(
                "device_map puts modules on 'disk', and a plugin decides where encoded weights go",
                expected="one of the two",
                fix="leave out device_map, or the plugin",
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Put frozen modules into the model.

        For an encoded checkpoint, they have the codec's parameters. For a plain one, they have the plain weights,
        because the loader casts each tensor to the dtype of its target parameter.
        """
        stored, codecs = stored_names(model, weight_specs(model)), self.quantization_config.codecs
        renamed = in_checkpoint(model, codecs, stored)
        self.codecs = stored_codecs(codecs, stored, renamed)
        if codecs.modules and not self.codecs:
            raise CheckpointError(
                "quantization_config.modules matches no linear module of this model", fix=_OTHER_MODEL
            )
        if renamed is not str:  # the model is saved under its own names
            owners = {part: codec for name, codec in self.codecs.items() for part in stored[name]}
            modules = [part for parts in stored.values() for part in parts]
            self.quantization_config.codecs = ModuleCodecs.from_owners(owners, modules)
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
            module._is_hf_initialized = True  # type: ignore[assignment]  # otherwise the loader would try to initialize missing bytes at random, and fail

    def _parameters(self) -> Iterator[tuple[str, list[str]]]:
        """Yield every encoded weight with the names, in its module, of the parameters that hold its buffers."""
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
            if (offloaded := _offloaded(module)) is not None:
                check_buffers(
                    module.frozen[leaf].codec,
                    {parameter.removeprefix(leaf): offloaded[parameter] for parameter in parameters},
                    module.frozen[leaf].shape,
                    name,
                )
                continue
            resident = [parameter for parameter in parameters if parameter in module._parameters]
            missing = [
                parameter
                for parameter in resident
                if not getattr(module._parameters[parameter], "_is_hf_initialized", False)
            ]
            if missing or (module.frozen[leaf].parameters is None and module.frozen[leaf].handle is None):
                raise CheckpointError(
                    f"{name.rpartition('.')[0]}.{(missing or [leaf])[0]} is missing",
                    fix="the checkpoint is incomplete: create it again",
                )
            # Weights that were encoded while loading are held already. hold() compares shapes; the loader does not.
            if self.pre_quantized:
                module.hold(module.export(leaf), leaf)
        for name, param in model.named_parameters():
            if param.shape != self.shapes.get(name, param.shape):
                raise CheckpointError(
                    f"{name} has shape {tuple(param.shape)}", expected=f"{tuple(self.shapes[name])}", fix=_OTHER_MODEL
                )
        self.frozen = {}  # the quantizer stays with the model, whose modules may be replaced
        return model

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        if not self.pre_quantized and (found := self.frozen.get(param_name)) is not None:
            weight = found[0].frozen[found[1]]
            if weight.placement is not None:
                return 0.0  # the loader reserves memory on the device for what this method returns
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

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # dtype is a string once the model has been saved.
        chosen = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        if any(_offloaded(module) is not None for module, _ in frozen_weights(model).values()):
            raise ConfigError(
                "the model is offloaded by device_map",
                expected="one that is in memory as a whole",
                fix="load it without device_map",
            )
        thaw_modules(model, chosen)
        # What was never encoded gets the same dtype, except buffers that are computed, such as RoPE's frequencies.
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(chosen)
        model.config.dtype = chosen
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # if it has an adapter: the Trainer refuses a quantized model without one

    @property
    def is_compileable(self) -> bool:
        return True


def _offloaded(module: FrozenModule) -> Mapping[str, Tensor] | None:
    """Return the parameters of a module that ``device_map`` puts on the disk; None for other modules.

    They are those of the hook with which accelerate (1.15) brings them to the device while the module computes.
    """
    hook = getattr(module, "_hf_hook", None)
    found = next((each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)), None)
    return None if found is None else found.weights_map


class _Encode(ConversionOps):
    """Loader step that encodes one weight.

    The weight arrives in the model's dtype, its frozen module takes it, and the loader is told that it is done.
    """

    def __init__(self, quantizer: ArcticQuantizer) -> None:
        self.quantizer = quantizer

    # The loader always passes full_layer_name, and accepts tensors as well as lists of them.
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        module, leaf = self.quantizer.frozen[full_layer_name]
        try:
            module.encode(value[0] if isinstance(value, list) else value, leaf)
        except (ArcticError, MemoryError, torch.OutOfMemoryError) as error:
            self.quantizer.quantization_config.failure = self.quantizer.quantization_config.failure or error
            raise
        for parameter in {leaf, *(module.frozen[leaf].parameters or {}).values()} & module._parameters.keys():
            module._parameters[parameter]._is_hf_initialized = True  # type: ignore[union-attr]  # otherwise the loader would initialize it at random
        return {full_layer_name: module._parameters[leaf]}  # type: ignore[dict-item]


def _num_parameters(
    stock: Any, model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Count the elements of the weights, encoded or not, as for the plain model."""
    total: int = stock(model, only_trainable, exclude_embeddings)
    if only_trainable:
        return total  # nothing encoded is trained
    modules = {id(module): module for module, _ in frozen_weights(model).values()}
    for module in modules.values():
        total += sum(math.prod(weight.shape) for weight in module.frozen.values())
        total -= sum(parameter.numel() for parameter in module.encoded())
    return total


def register() -> None:
    """Register the method ``arctic`` with transformers, so that ``from_pretrained`` reads encoded checkpoints.

    Also register what installed plugins add (models that transformers does not have, experts functions, RoPE types),
    and make PEFT's adapters work over frozen modules. Idempotent.

    :func:`~arctic_plugins_huggingface.load_model` calls this function. Without it, transformers refuses an encoded
    checkpoint, because the encoded weights do not have the shapes that the model declares.
    """
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(ArcticQuantizationConfig)
        register_quantizer(METHOD)(ArcticQuantizer)
        guard_tuners()
        patch(
            PreTrainedModel,
            "num_parameters",
            why="it counts the bytes and scales of encoded weights; a quantizer is not asked (only bitsandbytes' is)",
            read_in="transformers 5.19.0",
        )(_num_parameters)
    register_models()  # not once, because a plugin may have been installed since
    register_rope_types()
