"""The quantization method ``arctic`` in vLLM: the codecs that encoded a checkpoint compute with it, whoever wrote them.

vLLM fuses q/k/v and gate/up into one module. The row law makes that simple: their buffers are put one below the other, as vLLM does with weights,
and tensor parallelism takes rows, or slices along K that end at the codec's borders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arctic_plugins.claims import matches
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.frozen import Codec, codec_from_dict
from arctic_plugins.frozen.scratch import take_scratch
from arctic_plugins.provenance import FORMAT
from arctic_plugins_vllm.compat import (
    LinearBase,
    LinearMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
    UnquantizedLinearMethod,
    VocabParallelEmbedding,
    set_weight_attrs,
)

__all__ = ["ArcticConfig", "EncodedLinearMethod"]


class ArcticConfig(QuantizationConfig):
    """``quantization_config`` of a checkpoint: ``codecs`` (id -> codec) and ``modules`` (pattern -> id).

    Raises:
        CheckpointError: a newer format, or a codec with bad fields.
        PluginNotFoundError: no installed plugin provides a codec's type.
    """

    def __init__(self, codecs: Mapping[str, Codec], modules: Mapping[str, str]) -> None:
        super().__init__()
        self.codecs, self.modules = dict(codecs), dict(modules)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ArcticConfig:
        if config.get("format", 0) > FORMAT:
            raise CheckpointError(f"quantization_config has format {config['format']}", expected=f"at most {FORMAT}", fix="upgrade arctic-plugins")
        try:
            codecs, modules = config["codecs"], config["modules"]
        except KeyError as error:
            raise CheckpointError(f"quantization_config lacks the key {error}", fix="make the checkpoint again") from error
        if missing := sorted(set(modules.values()) - codecs.keys()):
            raise CheckpointError(f"quantization_config.modules names the codecs {missing}", expected=f"one of {sorted(codecs)}")
        return cls({name: codec_from_dict(codec) for name, codec in codecs.items()}, modules)

    @classmethod
    def get_name(cls) -> str:
        return "arctic"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # codecs are torch code: any device

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # everything is in config.json

    def codec_of(self, module: str) -> Codec | None:
        """The codec of the checkpoint's module of that dotted name, or None when it is not encoded."""
        return next((self.codecs[codec] for pattern, codec in self.modules.items() if matches(pattern, module)), None)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        parent, _, leaf = prefix.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(leaf, [leaf])]
        codecs = [self.codec_of(part) for part in parts]
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
        self.codec, self.prefix = codec, prefix

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
        on_disk = self.codec.layout((1, input_size))
        layer.arctic_shape, layer.arctic_loads = shape, {}
        for suffix, spec in self.codec.layout(shape).items():
            param = nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype), requires_grad=False)
            layer.register_parameter(f"weight{suffix}", param)
            loads = layer.arctic_loads[suffix] = _Loads(
                f"{self.prefix}.weight{suffix}", on_disk[suffix], len(output_partition_sizes), extra["weight_loader"]
            )
            set_weight_attrs(param, {"output_dim": 0, "input_dim": spec.k_dim, "weight_loader": loads})

    def process_weights_after_loading(self, layer: Any) -> None:
        for loads in layer.arctic_loads.values():
            loads.check()
        del layer.arctic_loads

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = layer.arctic_shape
        buffers = {suffix: getattr(layer, f"weight{suffix}") for suffix in self.codec.layout(shape)}
        y = self.codec.linear(x, buffers, shape, scratch=take_scratch(shape, x.dtype, x.device))
        return y if bias is None else y + bias


class _Loads:
    """A weight loader that compares what it is given with the codec's layout and remembers it: vLLM does neither for quantized weights."""

    def __init__(self, name: str, spec: Any, parts: int, loader: Callable[..., None]) -> None:
        self.name, self.spec, self.parts, self.loader = name, spec, parts, loader
        self.seen: set[Any] = set()

    def __call__(self, param: nn.Parameter, loaded: Tensor, *shard: Any, **kwargs: Any) -> None:
        expected = (self.spec.dtype, tuple(self.spec.shape[1:]))
        if (loaded.dtype, tuple(loaded.shape[1:])) != expected:
            raise CheckpointError(
                f"{self.name} is {loaded.dtype} {tuple(loaded.shape)} in the checkpoint",
                expected=f"{expected[0]} (rows, {', '.join(map(str, expected[1]))})",
                fix="the checkpoint does not fit its config.json: make it again",
            )
        self.seen.update(_parts(shard, self.parts))
        self.loader(param, loaded, *shard, **kwargs)

    def check(self) -> None:
        """Raise CheckpointError if a part of a fused weight, or all of it, never came."""
        if len(self.seen) < self.parts:
            raise CheckpointError(
                f"{self.name} is missing from the checkpoint ({len(self.seen)} of {self.parts} parts are there)",
                fix="the checkpoint is incomplete: make it again",
            )


def _parts(shard: Sequence[Any], parts: int) -> Sequence[Any]:
    """Which parts of a fused weight a call of the loader brings: the one it names, or all of them."""
    return range(parts) if not shard or shard[0] is None else shard[0] if isinstance(shard[0], tuple) else shard[:1]
