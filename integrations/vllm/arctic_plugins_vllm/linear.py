"""Linear layers in vLLM, over encoded weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from arctic_plugins.frozen import Codec, TensorSpec
from arctic_plugins_vllm.compat import LinearMethodBase, loading, set_weight_attrs
from arctic_plugins_vllm.loaders import Reader, check_loaded, check_seen, check_split, read
from arctic_plugins_vllm.native import Format, Native, choose
from arctic_plugins_vllm.ops import codec_linear, codec_text

__all__ = ["EncodedLinearMethod"]


class EncodedLinearMethod(LinearMethodBase):
    """Method whose parameters follow :meth:`Codec.layout` and which computes with :meth:`Codec.linear`.

    Where vLLM has a kernel for one of ``formats``, its own method takes the weights once they are loaded, and computes
    (:mod:`arctic_plugins_vllm.native`).

    Args:
        codec: the codec of the weight.
        prefix: the module's name.
        reader: converts a weight in the checkpoint to buffers; None if the checkpoint contains the buffers.
        formats: vLLM's own formats that hold the codec's bytes.

    Attributes:
        weights: a description of the layer's weights, for users.
        native: vLLM's own method for the layer, chosen when parameters are created; None if the codec computes.
    """

    def __init__(self, codec: Codec, prefix: str, reader: Reader | None = None, formats: Sequence[Format] = ()) -> None:
        self.codec, self.prefix, self.reader, self.text = codec, prefix, reader, codec_text(codec)
        self.weights, self.formats = codec.describe(), formats
        self.native: Native | None = None

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
            ConfigError: tensor parallelism would split along K at a point where the codec cannot be split.
        """
        check_split(self.codec, self.prefix, input_size_per_partition, input_size)
        shape = (sum(output_partition_sizes), input_size_per_partition)
        on_disk, parts = self.codec.layout((1, input_size)), len(output_partition_sizes)
        layer.arctic_shape, layer.arctic_parts, layer.arctic_seen = shape, parts, {}
        layer.arctic_counts = not loading()[
            2
        ]  # files of a single process are loaded without loaders, and vLLM itself reports missing tensors
        layout = self.codec.layout(shape)
        layer.arctic_names = {suffix: f"weight{suffix}" for suffix in layout}
        for suffix, spec in layout.items():
            param = nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype), requires_grad=False)
            layer.register_parameter(f"weight{suffix}", param)
            name = f"{self.prefix}.weight{suffix}"
            layer.arctic_seen[name] = set()
            # Bound to the layer, like vLLM's own loaders: what vLLM keeps for a reload must not reference the layer
            # (model_loader/reload/sanitize.py).
            loader = MethodType(_checked_loader(name, on_disk[suffix], parts, extra["weight_loader"].__func__), layer)
            set_weight_attrs(
                param, {"output_dim": 0, "input_dim": spec.k_dim, "weight_loader": loader, "arctic_loader": loader}
            )
        if self.reader is not None:
            whole = read(self.reader, self.codec, input_size, layer.arctic_names, f"{self.prefix}.weight")
            layer.weight.weight_loader = MethodType(whole, layer)

        def create(method: Any, twin: Any) -> None:
            sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size)
            method.create_weights(twin, *sizes, params_dtype, **extra)

        self.native = choose(self.formats, layer, self.prefix, self.weights, create)

    def check_complete(self, layer: Any) -> None:
        """Raise CheckpointError if a weight, or a part of a fused one, was not loaded since the last call."""
        for name, seen in layer.arctic_seen.items() if layer.arctic_counts else ():
            check_seen(name, seen, layer.arctic_parts)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all weights were loaded, and let vLLM's own method take them if there is one.

        Called again after each reload of the layer, with the parameters of :meth:`create_weights`.

        Raises:
            CheckpointError: see :meth:`check_complete` and :meth:`Native.take`.
        """
        self.check_complete(layer)
        if (native := self.native) is not None:

            def tensors() -> dict[str, Tensor]:
                return native.exporter.tensors(self.codec, self._buffers(layer), layer.arctic_shape)

            if not native.take(layer, self.prefix, layer.arctic_names.values(), tensors):
                self.native = None

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.native is not None:
            computed: Tensor = self.native.method.apply(layer, x, bias)
            return computed
        y = codec_linear(x, self._buffers(layer), self.codec, self.text, layer.arctic_shape)
        return y if bias is None else y + bias

    def _buffers(self, layer: Any) -> dict[str, Tensor]:
        return {suffix: getattr(layer, name) for suffix, name in layer.arctic_names.items()}


def _checked_loader(name: str, spec: TensorSpec, parts: int, host_loader: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``host_loader``, a method of vLLM's layer, with checks that vLLM does not make for quantized weights.

    The wrapper compares loaded tensors with the codec's layout and records them in ``layer.arctic_seen``.
    """

    def arctic_weight_loader(
        layer: Any, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None
    ) -> None:
        check_loaded(name, loaded_weight, spec, rows=False)
        if loaded_shard_id is None:
            layer.arctic_seen[name].update(range(parts))  # fused on disk as well, or not fused at all
            host_loader(layer, param, loaded_weight)
        else:
            layer.arctic_seen[name].update(loaded_shard_id if isinstance(loaded_shard_id, tuple) else [loaded_shard_id])
            host_loader(layer, param, loaded_weight, loaded_shard_id)

    return arctic_weight_loader
