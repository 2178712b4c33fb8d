"""The quantization method ``arctic`` in vLLM: the codecs that encoded a checkpoint compute with it, whoever wrote them.

vLLM fuses q/k/v and gate/up into one module. The row law makes that simple: their buffers are put one below the other, as vLLM does with weights,
and tensor parallelism takes rows, or slices along K that end at the codec's borders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.frozen import METHOD, Codec, ModuleCodecs, TensorSpec
from arctic_plugins.provenance import FILE_NAME, check_files
from arctic_plugins_vllm.compat import (
    LinearBase,
    LinearMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
    UnquantizedLinearMethod,
    VocabParallelEmbedding,
    set_weight_attrs,
)
from arctic_plugins_vllm.ops import codec_linear, codec_text

__all__ = ["ArcticConfig", "EncodedLinearMethod"]


class ArcticConfig(QuantizationConfig):
    """``quantization_config`` of a checkpoint; see :class:`arctic_plugins.frozen.ModuleCodecs`, also for the errors raised."""

    def __init__(self, codecs: ModuleCodecs) -> None:
        super().__init__()
        self.codecs = codecs

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ArcticConfig:
        return cls(ModuleCodecs.from_config(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called by vLLM with the checkpoint's name before weights are read: the one place where its files can be checked."""
        if (Path(model_name) / FILE_NAME).is_file():
            check_files(model_name)

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # codecs are torch code: any device

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # everything is in config.json

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Called by vLLM for models that it names otherwise than transformers does (most that see images)."""
        self.codecs = ModuleCodecs(self.codecs.codecs, hf_to_vllm_mapper.apply_dict(self.codecs.modules))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        parent, _, leaf = prefix.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(leaf, [leaf])]
        codecs = [self.codecs.codec_of(part) for part in parts]
        if len(set(codecs)) > 1:
            found = ", ".join(f"{part}: {codec}" for part, codec in zip(parts, codecs, strict=True))
            raise CheckpointError(f"vLLM fuses modules with different codecs ({found})", expected="one codec", fix="encode them alike")
        codec = codecs[0]
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod() if codec is None else EncodedLinearMethod(codec, prefix)
        if codec is not None and isinstance(layer, VocabParallelEmbedding):
            raise CheckpointError(
                f"{prefix} is encoded", expected="a plain output head, the only kind that vLLM serves", fix="exclude it and encode again"
            )
        return None


class EncodedLinearMethod(LinearMethodBase):
    """Parameters as :meth:`Codec.layout` gives them, computation as :meth:`Codec.linear` does it."""

    def __init__(self, codec: Codec, prefix: str) -> None:
        self.codec, self.prefix, self.text = codec, prefix, codec_text(codec)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register empty buffers for this rank's ``[sum(output_partition_sizes), input_size_per_partition]``.

        Raises:
            ConfigError: tensor parallelism would split along K where the codec cannot be split.
        """
        if input_size_per_partition != input_size and input_size_per_partition % self.codec.k_border:
            raise ConfigError(
                f"{self.prefix} would be split along its inputs every {input_size_per_partition}",
                expected=f"a multiple of the group size {self.codec.k_border}",
                fix="lower --tensor-parallel-size, or encode with another group_size ('channel' can be split anywhere)",
            )
        shape = (sum(output_partition_sizes), input_size_per_partition)
        on_disk, parts = self.codec.layout((1, input_size)), len(output_partition_sizes)
        layer.arctic_shape, layer.arctic_parts, layer.arctic_seen = shape, parts, {}
        layout = self.codec.layout(shape)
        layer.arctic_names = {suffix: f"weight{suffix}" for suffix in layout}
        for suffix, spec in layout.items():
            param = nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype), requires_grad=False)
            layer.register_parameter(f"weight{suffix}", param)
            name = f"{self.prefix}.weight{suffix}"
            layer.arctic_seen[name] = set()
            # Bound to the layer, as vLLM's own loaders are: what it keeps for a reload must not hold the layer (model_loader/reload/sanitize.py).
            loader = MethodType(_checked_loader(name, on_disk[suffix], parts, extra["weight_loader"].__func__), layer)
            set_weight_attrs(param, {"output_dim": 0, "input_dim": spec.k_dim, "weight_loader": loader})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raise CheckpointError if a part of a fused weight, or all of it, never came. Called again after each reload of the layer."""
        parts = layer.arctic_parts
        for name, seen in layer.arctic_seen.items():
            if len(seen) < parts:
                raise CheckpointError(
                    f"{name} is missing from the checkpoint ({len(seen)} of {parts} parts are there)",
                    fix="the checkpoint is incomplete: make it again",
                )
            seen.clear()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        buffers = {suffix: getattr(layer, name) for suffix, name in layer.arctic_names.items()}
        y = codec_linear(x, buffers, self.codec, self.text, layer.arctic_shape)
        return y if bias is None else y + bias


def _checked_loader(name: str, spec: TensorSpec, parts: int, host_loader: Callable[..., None]) -> Callable[..., None]:
    """``host_loader`` (a method of vLLM's layer), which compares what it is given with the codec's layout and remembers it in
    ``layer.arctic_seen``: vLLM does neither for quantized weights."""

    def arctic_weight_loader(layer: Any, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        if loaded_weight.dtype != spec.dtype or loaded_weight.shape[1:] != spec.shape[1:]:
            raise CheckpointError(
                f"{name} is {loaded_weight.dtype} {tuple(loaded_weight.shape)} in the checkpoint",
                expected=f"{spec.dtype} (rows, {', '.join(map(str, spec.shape[1:]))})",
                fix="the checkpoint does not fit its config.json: make it again",
            )
        if loaded_shard_id is None:
            layer.arctic_seen[name].update(range(parts))  # fused on disk too, or not fused at all
            host_loader(layer, param, loaded_weight)
        else:
            layer.arctic_seen[name].update(loaded_shard_id if isinstance(loaded_shard_id, tuple) else [loaded_shard_id])
            host_loader(layer, param, loaded_weight, loaded_shard_id)

    return arctic_weight_loader
