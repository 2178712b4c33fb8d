"""The quantization method ``arctic`` in vLLM: the codecs that encoded a checkpoint compute with it, whoever wrote them.

vLLM fuses q/k/v and gate/up into one module. The row law makes that simple: their buffers are put one below the other, as vLLM does with weights,
and tensor parallelism takes rows, or slices along K that end at the codec's borders.
"""

from __future__ import annotations

import json
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
    FusedMoEMethodBase,
    LinearBase,
    LinearMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
    RoutedExperts,
    UnquantizedLinearMethod,
    VocabParallelEmbedding,
    expert_activation,
    set_weight_attrs,
)
from arctic_plugins_vllm.ops import codec_experts, codec_linear, codec_text

__all__ = ["ArcticConfig", "EncodedExpertsMethod", "EncodedLinearMethod"]


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
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod() if codec is None else EncodedLinearMethod(codec, prefix)
        if codec is not None and isinstance(layer, VocabParallelEmbedding):
            raise CheckpointError(
                f"{prefix} is encoded", expected="a plain output head, the only kind that vLLM serves", fix="exclude it and encode again"
            )
        return None

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        gate, down, up = layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name
        codecs = {leaf: self.codecs.codec_of(f"{prefix}.0.{leaf}") for leaf in (gate, up, down) if leaf is not None}
        if up is not None and codecs[gate] != codecs[up]:
            found = f"{gate}: {codecs[gate]}, {up}: {codecs[up]}"
            raise CheckpointError(
                f"vLLM fuses {prefix}'s weights, which have different codecs ({found})", expected="one codec", fix="encode them alike"
            )
        if codecs[gate] is None and codecs[down] is None:
            return None
        if codecs[gate] is None or codecs[down] is None:
            raise CheckpointError(f"only some of {prefix}'s weights are encoded", expected="all of them, or none", fix="encode them together")
        return EncodedExpertsMethod(codecs[gate], codecs[down], layer, prefix)  # type: ignore[arg-type]


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
        _check_split(self.codec, self.prefix, input_size_per_partition, input_size)
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
        for name, seen in layer.arctic_seen.items():
            _check_seen(name, seen, layer.arctic_parts)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        buffers = {suffix: getattr(layer, name) for suffix, name in layer.arctic_names.items()}
        y = codec_linear(x, buffers, self.codec, self.text, layer.arctic_shape)
        return y if bias is None else y + bias


def _checked_loader(name: str, spec: TensorSpec, parts: int, host_loader: Callable[..., None]) -> Callable[..., None]:
    """``host_loader`` (a method of vLLM's layer), which compares what it is given with the codec's layout and remembers it in
    ``layer.arctic_seen``: vLLM does neither for quantized weights."""

    def arctic_weight_loader(layer: Any, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        _check_loaded(name, loaded_weight, spec, rows=False)
        if loaded_shard_id is None:
            layer.arctic_seen[name].update(range(parts))  # fused on disk too, or not fused at all
            host_loader(layer, param, loaded_weight)
        else:
            layer.arctic_seen[name].update(loaded_shard_id if isinstance(loaded_shard_id, tuple) else [loaded_shard_id])
            host_loader(layer, param, loaded_weight, loaded_shard_id)

    return arctic_weight_loader


class EncodedExpertsMethod(FusedMoEMethodBase):
    """The two fused weights of a mixture's experts: ``w13 [E, 2I, K]`` and ``w2 [E, K, I]``, E and I being this process's.

    Codecs compute with the experts that received tokens; those of other processes (``layer.expert_map``) add nothing here.
    """

    def __init__(self, up: Codec, down: Codec, layer: Any, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.codecs, self.prefix, self.texts = {"w13": up, "w2": down}, prefix, (codec_text(up), codec_text(down))
        unsupported = {
            "biases": layer.moe_config.has_bias,
            "routing weights on the inputs of experts": layer.apply_router_weight_on_input,
            "padded tensor parallel shards": layer.moe_config.tp_shard_with_padding,
        }
        if found := [what for what, there in unsupported.items() if there]:
            raise ConfigError(
                f"{prefix} is encoded and has {' and '.join(found)}", expected="experts without", fix="exclude the experts and encode again"
            )

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None  # for vLLM's kernels, which are not used

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int, params_dtype: torch.dtype, **extra: Any
    ) -> None:
        """Register empty buffers for this process's experts and part of the intermediate size.

        Raises:
            ConfigError: tensor parallelism would split along K where the codec cannot be split.
        """
        parts, whole = (2 if self.moe.is_act_and_mul else 1), intermediate_size_per_partition * self.moe.tp_size
        _check_split(self.codecs["w2"], self.prefix, intermediate_size_per_partition, whole)
        shapes = {
            "w13": (num_experts, parts * intermediate_size_per_partition, hidden_size),
            "w2": (num_experts, hidden_size, intermediate_size_per_partition),
        }
        on_disk = {"w13": (whole, hidden_size), "w2": (hidden_size, whole)}
        layer.arctic_shapes, layer.arctic_seen, layer.arctic_names = (shapes["w13"], shapes["w2"]), {}, {"w13": {}, "w2": {}}
        layer.arctic_parts, layer.arctic_activation = {"w13": num_experts * parts, "w2": num_experts}, json.dumps(expert_activation(layer))
        for leaf, shape in shapes.items():
            specs = self.codecs[leaf].layout(on_disk[leaf])
            for suffix, spec in self.codecs[leaf].layout(shape).items():
                param = nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype), requires_grad=False)
                layer.register_parameter(name := f"{leaf}_weight{suffix}", param)
                layer.arctic_names[leaf][suffix], layer.arctic_seen[name] = name, set()
                loader = MethodType(_expert_loader(f"{self.prefix}.{name}", name, specs[suffix]), layer)
                set_weight_attrs(param, {"weight_loader": loader})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raise CheckpointError if an expert's weight never came. Called again after each reload of the layer."""
        for leaf, names in layer.arctic_names.items():
            for name in names.values():
                _check_seen(f"{self.prefix}.{name}", layer.arctic_seen[name], layer.arctic_parts[leaf])

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any = None, shared_experts_input: Tensor | None = None
    ) -> Tensor:
        index = topk_ids.long()
        if layer.expert_map is not None:
            index = layer.expert_map[index].long()
        up, down = ({suffix: getattr(layer, name) for suffix, name in names.items()} for names in layer.arctic_names.values())
        return codec_experts(x, index, topk_weights, up, down, self.texts, layer.arctic_shapes, layer.arctic_activation)


def _check_split(codec: Codec, prefix: str, part: int, whole: int) -> None:
    """Raise ConfigError if a weight with ``whole`` inputs cannot be split every ``part`` of them."""
    if part != whole and part % codec.k_border:
        raise ConfigError(
            f"{prefix} would be split along its inputs every {part}",
            expected=f"a multiple of the group size {codec.k_border}",
            fix="lower --tensor-parallel-size, or encode with another group_size ('channel' can be split anywhere)",
        )


def _check_seen(name: str, seen: set[Any], parts: int) -> None:
    """Raise CheckpointError unless all parts of a fused weight came; forget them."""
    if len(seen) < parts:
        raise CheckpointError(
            f"{name} is missing from the checkpoint ({len(seen)} of {parts} parts are there)", fix="the checkpoint is incomplete: make it again"
        )
    seen.clear()


def _check_loaded(name: str, found: Tensor, spec: TensorSpec, *, rows: bool) -> None:
    """Raise CheckpointError unless a loaded tensor is of a codec's layout, in its first dimension too if ``rows``; vLLM does not compare."""
    start = 0 if rows else 1
    if found.dtype != spec.dtype or found.shape[start:] != spec.shape[start:]:
        first = "" if rows else "rows, "
        raise CheckpointError(
            f"{name} is {found.dtype} {tuple(found.shape)} in the checkpoint",
            expected=f"{spec.dtype} ({first}{', '.join(map(str, spec.shape[start:]))})",
            fix="the checkpoint does not fit its config.json: make it again",
        )


def _expert_loader(full_name: str, name: str, spec: TensorSpec) -> Callable[..., bool | None]:
    """Loads one expert's buffer, laid out on disk as ``spec`` says: this process's rows of w1 and w3, its part along K of w2."""

    def arctic_weight_loader(
        layer: Any, param: nn.Parameter, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int, return_success: bool = False
    ) -> bool | None:
        local = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local == -1:
            return False if return_success else None
        _check_loaded(f"{full_name} ({weight_name}, expert {expert_id})", loaded_weight, spec, rows=True)
        rank, own = layer.moe_config.tp_rank, param.data[local]
        if shard_id != "w2":
            size = own.shape[0] // (2 if layer.moe_config.is_act_and_mul else 1)
            own.narrow(0, size if shard_id == "w3" else 0, size).copy_(loaded_weight.narrow(0, rank * size, size))
        elif spec.k_dim is None:
            own.copy_(loaded_weight)
        else:
            size = own.shape[spec.k_dim]
            own.copy_(loaded_weight.narrow(spec.k_dim, rank * size, size))
        layer.arctic_seen[name].add((local, shard_id))
        return True if return_success else None

    return arctic_weight_loader
