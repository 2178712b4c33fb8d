"""Loading of encoded weights into vLLM's layers.

Tensors in the checkpoint are checked, counted, and converted to buffers if necessary. vLLM itself neither compares
shapes and dtypes of quantized weights nor notices missing ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from arctic_plugins.errors import CheckpointError, CodecError, ConfigError, named
from arctic_plugins.frozen import Codec, TensorSpec
from arctic_plugins.frozen.exporting import Converter

__all__ = ["Reader", "check_loaded", "check_seen", "check_split", "convert", "encode", "read"]

Reader = Callable[[Tensor, Codec, int], Mapping[str, Tensor]]
"""``(a weight in the checkpoint, its codec, K) -> buffers``."""


def encode(weight: Tensor, codec: Codec, in_features: int) -> Mapping[str, Tensor]:
    """Encode ``weight [N, K]``: the reader for plain checkpoints.

    Raises:
        CheckpointError: the weight is not plain.
        CodecError: it holds NaN or Inf.
    """
    if not weight.is_floating_point() or weight.shape[1:] != (in_features,):
        raise CheckpointError(
            f"a weight to encode is {weight.dtype} {tuple(weight.shape)}",
            expected=f"a floating-point dtype and (rows, {in_features})",
            fix="use a plain checkpoint",
        )
    return codec.encode(weight)


def convert(converter: Converter) -> Reader:
    """Return a reader for checkpoints in another format, whose plain weights are encoded."""

    def converted(weight: Tensor, codec: Codec, in_features: int) -> Mapping[str, Tensor]:
        if weight.is_floating_point():
            return encode(weight, codec, in_features)
        return converter.buffers(weight, (converter.rows(weight, in_features), in_features))

    return converted


def read(
    reader: Reader, codec: Codec, in_features: int, names: Mapping[str, str], full_name: str
) -> Callable[..., Any]:
    """Return a weight loader that converts a weight with ``reader`` and passes the buffers to their own loaders.

    Args:
        reader: see :data:`Reader`.
        codec: the codec of the weight.
        in_features: K of the whole weight, as in checkpoints.
        names: suffix -> the layer's parameter, which has the attribute ``arctic_loader``.
        full_name: the name of the weight in errors.
    """

    def arctic_weight_loader(layer: Any, param: nn.Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        with named(full_name, CheckpointError, CodecError):
            buffers = reader(loaded_weight.to(param.device), codec, in_features)
        results = [
            (own := getattr(layer, names[suffix])).arctic_loader(own, buffer, *args, **kwargs)
            for suffix, buffer in buffers.items()
        ]
        return results[0]

    return arctic_weight_loader


def check_split(codec: Codec, prefix: str, part: int, whole: int) -> None:
    """Raise ConfigError if a weight with ``whole`` inputs cannot be split into parts of ``part`` inputs."""
    if part != whole and part % codec.k_border:
        raise ConfigError(
            f"{prefix} would be split along its inputs into parts of {part}",
            expected=f"a multiple of the group size {codec.k_border}",
            fix="lower --tensor-parallel-size, or encode with another group_size ('channel' can be split anywhere)",
        )


def check_seen(name: str, seen: set[Any], parts: int) -> None:
    """Raise CheckpointError unless all parts of a fused weight were loaded, and reset ``seen``."""
    if len(seen) < parts:
        raise CheckpointError(
            f"{name} is missing from the checkpoint ({len(seen)} of {parts} parts found)",
            fix="the checkpoint is incomplete; create it again",
        )
    seen.clear()


def check_loaded(name: str, found: Tensor, spec: TensorSpec, *, rows: bool) -> None:
    """Raise CheckpointError unless a loaded tensor matches ``spec``, including its first dimension if ``rows``."""
    start = 0 if rows else 1
    if found.dtype != spec.dtype or found.shape[start:] != spec.shape[start:]:
        first = "" if rows else "rows, "
        raise CheckpointError(
            f"{name} is {found.dtype} {tuple(found.shape)} in the checkpoint",
            expected=f"{spec.dtype} ({first}{', '.join(map(str, spec.shape[start:]))})",
            fix="the checkpoint does not match its config.json; create it again",
        )
