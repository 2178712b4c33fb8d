"""Experts of mixtures in vLLM, over encoded weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from arctic_plugins.errors import ConfigError
from arctic_plugins.frozen import Codec, Exporter, TensorSpec
from arctic_plugins_vllm.compat import FusedMoEMethodBase, expert_activation, loading, set_weight_attrs
from arctic_plugins_vllm.loaders import Reader, check_loaded, check_seen, check_split, read
from arctic_plugins_vllm.native import Format, Native, choose
from arctic_plugins_vllm.ops import codec_experts, codec_text

__all__ = ["EncodedExpertsMethod"]


class EncodedExpertsMethod(FusedMoEMethodBase):
    """Method for the two fused weights of a mixture's experts, ``w13 [E, 2I, K]`` and ``w2 [E, K, I]``.

    E and I are those of this process. Codecs compute with the experts that received tokens; experts of other processes
    (``layer.expert_map``) contribute nothing here. Where vLLM has a kernel for one of ``formats``, its own method takes
    the weights once they are loaded, and computes (:mod:`arctic_plugins_vllm.native`).

    Args:
        up, down: codecs of the two weights.
        layer: vLLM's RoutedExperts.
        prefix: its name.
        reader: converts an expert's weight in the checkpoint to buffers; None if the checkpoint contains the buffers.
        formats: vLLM's own formats that hold the bytes of both codecs.

    Attributes:
        weights: a description of the layer's weights, for users.
        native: vLLM's own method for the layer, chosen when parameters are created; None if the codecs compute.

    Raises:
        ConfigError: the layer has a feature that this method does not support.
    """

    def __init__(
        self,
        up: Codec,
        down: Codec,
        layer: Any,
        prefix: str,
        reader: Reader | None = None,
        formats: Sequence[Format] = (),
    ) -> None:
        super().__init__(layer.moe_config)
        self.reader, self.formats = reader, formats
        self.weights = "experts in " + " and ".join(dict.fromkeys((up.describe(), down.describe())))
        self.native: Native | None = None
        self.codecs, self.prefix, self.texts = {"w13": up, "w2": down}, prefix, (codec_text(up), codec_text(down))
        unsupported = {
            "biases": layer.moe_config.has_bias,
            "routing weights on the inputs of experts": layer.apply_router_weight_on_input,
            "padded tensor parallel shards": layer.moe_config.tp_shard_with_padding,
        }
        if found := [what for what, there in unsupported.items() if there]:
            raise ConfigError(
                f"{prefix} is encoded and has {' and '.join(found)}",
                expected="experts without them",
                fix="exclude the experts and encode again",
            )

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return None if self.native is None else self.native.method.get_fused_moe_quant_config(layer)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register empty buffers for this process's experts and part of the intermediate size.

        Raises:
            ConfigError: tensor parallelism would split along K at a point where the codec cannot be split.
        """
        parts, whole = (2 if self.moe.is_act_and_mul else 1), intermediate_size_per_partition * self.moe.tp_size
        check_split(self.codecs["w2"], self.prefix, intermediate_size_per_partition, whole)
        shapes = {
            "w13": (num_experts, parts * intermediate_size_per_partition, hidden_size),
            "w2": (num_experts, hidden_size, intermediate_size_per_partition),
        }
        on_disk = {"w13": (whole, hidden_size), "w2": (hidden_size, whole)}
        layer.arctic_shapes, layer.arctic_seen, layer.arctic_names = (
            (shapes["w13"], shapes["w2"]),
            {},
            {"w13": {}, "w2": {}},
        )
        layer.arctic_counts = not loading()[2]  # see EncodedLinearMethod
        layer.arctic_parts, layer.arctic_activation = (
            {"w13": num_experts * parts, "w2": num_experts},
            json.dumps(expert_activation(layer)),
        )
        for leaf, shape in shapes.items():
            specs = self.codecs[leaf].layout(on_disk[leaf])
            for suffix, spec in self.codecs[leaf].layout(shape).items():
                param = nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype), requires_grad=False)
                layer.register_parameter(name := f"{leaf}_weight{suffix}", param)
                layer.arctic_names[leaf][suffix], layer.arctic_seen[name] = name, set()
                loader = MethodType(_expert_loader(f"{self.prefix}.{name}", name, specs[suffix]), layer)
                set_weight_attrs(param, {"weight_loader": loader, "arctic_loader": loader})
            if self.reader is not None:
                plain = read(
                    self.reader,
                    self.codecs[leaf],
                    on_disk[leaf][1],
                    layer.arctic_names[leaf],
                    f"{self.prefix}.{leaf}_weight",
                )
                getattr(layer, f"{leaf}_weight").weight_loader = MethodType(plain, layer)

        def create(method: Any, twin: Any) -> None:
            sizes = (num_experts, hidden_size, intermediate_size_per_partition)
            method.create_weights(twin, *sizes, params_dtype, **extra)

        self.native = choose(self.formats, layer, self.prefix, self.weights, create)

    def check_complete(self, layer: Any) -> None:
        """Raise CheckpointError if an expert's weight was not loaded since the last call."""
        for leaf, names in layer.arctic_names.items() if layer.arctic_counts else ():
            for name in names.values():
                check_seen(f"{self.prefix}.{name}", layer.arctic_seen[name], layer.arctic_parts[leaf])

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all weights were loaded, and let vLLM's own method take them if there is one.

        Called again after each reload of the layer, with the parameters of :meth:`create_weights`.

        Raises:
            CheckpointError: see :meth:`check_complete` and :meth:`Native.take`.
        """
        self.check_complete(layer)
        if self.native is not None:
            exporter = self.native.exporter
            own = [name for names in layer.arctic_names.values() for name in names.values()]
            if self.native.take(layer, self.prefix, own, lambda: self._exported(layer, exporter)):
                # vLLM reads these of the layer's method: for its runner, and for LoRA over experts.
                self.moe_kernel, self.moe_quant_config = (
                    self.native.method.moe_kernel,
                    self.native.method.moe_quant_config,
                )
            else:
                self.native = None

    def _exported(self, layer: Any, exporter: Exporter) -> dict[str, Tensor]:
        """Return the exported tensors of both weights: those of a matrix with the rows of all experts, by the row law.

        vLLM's names for them are those of the format after ``w13_`` and ``w2_``.
        """
        found: dict[str, Tensor] = {}
        for (leaf, names), shape in zip(layer.arctic_names.items(), layer.arctic_shapes, strict=True):
            rows = {suffix: getattr(layer, name).flatten(0, 1) for suffix, name in names.items()}
            exported = exporter.tensors(self.codecs[leaf], rows, (shape[0] * shape[1], shape[2]))
            found |= {f"{leaf}_{name}": tensor.unflatten(0, shape[:2]) for name, tensor in exported.items()}
        return found

    def apply_monolithic(self, layer: Any, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None) -> Any:
        """Let vLLM's method compute; the layer only calls this if that method's kernel also routes."""
        assert self.native is not None
        return self.native.method.apply_monolithic(layer, x, router_logits, input_ids)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Any:
        if self.native is not None:
            return self.native.method.apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        index = topk_ids.long()
        if layer.expert_map is not None:
            index = layer.expert_map[index].long()
        up, down = (
            {suffix: getattr(layer, name) for suffix, name in names.items()} for names in layer.arctic_names.values()
        )
        return codec_experts(x, index, topk_weights, up, down, self.texts, layer.arctic_shapes, layer.arctic_activation)


def _expert_loader(full_name: str, name: str, spec: TensorSpec) -> Callable[..., bool | None]:
    """Return a loader for one expert's buffer, whose layout on disk is ``spec``.

    It loads this process's rows of w1 and w3, and its part of w2 along K.
    """

    def arctic_weight_loader(
        layer: Any,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        local = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local == -1:
            return False if return_success else None
        check_loaded(f"{full_name} ({weight_name}, expert {expert_id})", loaded_weight, spec, rows=True)
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
