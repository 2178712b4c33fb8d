"""Codecs: how a frozen weight becomes bytes and back. Pure functions of their configuration, known to both hosts."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import CheckpointError, CodecError
from arctic_plugins.frozen.scratch import take_scratch

__all__ = ["Buffers", "Codec", "TensorSpec", "check_buffers", "codec_from_dict", "codec_to_dict"]

Buffers = Mapping[str, Tensor]
"""Suffix -> tensor. The suffix is what follows ``weight`` in a parameter's name: ``""`` holds the codes, ``"_scale"``
the scales.
"""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    k_dim: int | None = None
    """The dimension that runs along the weight's K and can be split there (on group borders), or None when it has
    none.
    """

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Codec(ABC):
    """Encodes weights ``[*lead, N, K]``. Subclass as a frozen dataclass whose fields are the codec's whole
    configuration.

    The **row law**: every buffer is ``[*lead, N, ...]``, and slicing the dimensions up to N selects those rows (or
    experts). Tensor parallelism along N, fused q/k/v and decoding only some experts follow from it. Codes never have
    the weight's own shape ``[N, K]``, so that a host without the plugin stops with a shape error instead of taking
    bytes for numbers.

    To add a codec: implement :meth:`layout`, :meth:`encode` and :meth:`decode`, register the class under :attr:`type`
    in the plugin's ``register`` hook, and claim modules with an instance of it. :meth:`linear`, :meth:`grad_input` and
    their counterparts for experts can be overridden with something fused, which should be a torch operator, so that
    compilers take it as it is.
    """

    type: ClassVar[str]
    """The ``type`` under which checkpoints name the codec."""

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The buffers that a weight of ``shape`` becomes. Raises CodecError for a shape that cannot be encoded."""

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Encode ``weight`` (any floating dtype) into buffers of :meth:`layout`. Raises CodecError for NaN or infinite
        values.
        """

    @abstractmethod
    def decode(
        self, buffers: Buffers, shape: tuple[int, ...], dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Tensor:
        """Decode to ``shape`` and ``dtype``, into the contiguous ``out`` when it is given."""

    def linear(self, x: Tensor, buffers: Buffers, shape: tuple[int, int]) -> Tensor:
        """``x [..., K] @ decode(buffers).T`` in the dtype of ``x``."""
        return torch.nn.functional.linear(
            x, self.decode(buffers, shape, x.dtype, out=take_scratch(shape, x.dtype, x.device))
        )

    def grad_input(self, grad: Tensor, buffers: Buffers, shape: tuple[int, int]) -> Tensor:
        """``grad [..., N] @ decode(buffers)`` in the dtype of ``grad``: the gradient of :meth:`linear` for ``x``."""
        return grad @ self.decode(buffers, shape, grad.dtype, out=take_scratch(shape, grad.dtype, grad.device))

    def linear_experts(self, x: Tensor, buffers: Buffers, shape: tuple[int, int, int], counts: Sequence[int]) -> Tensor:
        """:meth:`linear` with one matrix per expert: ``x [M, K]`` is sorted by expert, ``counts`` says how many rows
        each of the E has.

        ``buffers`` are those of a weight of ``shape`` ``(E, N, K)``; experts without rows are not read.
        """
        return _by_expert(self.linear, x, buffers, shape, counts, shape[1])

    def grad_input_experts(
        self, grad: Tensor, buffers: Buffers, shape: tuple[int, int, int], counts: Sequence[int]
    ) -> Tensor:
        """:meth:`grad_input` likewise: ``grad [M, N]`` -> ``[M, K]``."""
        return _by_expert(self.grad_input, grad, buffers, shape, counts, shape[2])

    @property
    def k_border(self) -> int:
        """The weight may be split along K at multiples of this (tensor parallelism); 1 when anywhere."""
        return 1

    def describe(self) -> str:
        """``fp8 (bits 8, group_size channel)``, for people."""
        fields = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(self).items())
        return f"{self.type} ({fields})" if fields else self.type

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of an encoded weight of ``shape``."""
        return sum(spec.nbytes for spec in self.layout(shape).values())


def _by_expert(
    product: Callable[[Tensor, Buffers, tuple[int, int]], Tensor],
    rows: Tensor,
    buffers: Buffers,
    shape: tuple[int, int, int],
    counts: Sequence[int],
    width: int,
) -> Tensor:
    """``product`` of every expert's rows with its own buffers: by the row law these are slices. ``width``: columns of
    the result.
    """
    results = [
        product(own, {suffix: buffer[expert] for suffix, buffer in buffers.items()}, shape[1:])
        for expert, own in enumerate(rows.split(list(counts)))
        if len(own)
    ]
    return torch.cat(results) if results else rows.new_empty(0, width)


def check_buffers(codec: Codec, buffers: Buffers, shape: tuple[int, ...], name: str) -> None:
    """Check that ``buffers`` are what ``codec`` makes of a weight of ``shape``; hosts do not check shapes of quantized
    weights.

    Raises:
        CheckpointError: names the tensor with the shape and dtype found and expected.
    """
    for suffix, spec in codec.layout(shape).items():
        found = buffers.get(suffix)
        if found is None:
            raise CheckpointError(
                f"{name}{suffix} is missing from the checkpoint", fix="the checkpoint is incomplete: make it again"
            )
        if tuple(found.shape) != spec.shape or found.dtype != spec.dtype:
            raise CheckpointError(
                f"{name}{suffix} is {found.dtype} {tuple(found.shape)}",
                expected=f"{spec.dtype} {spec.shape} for {codec}",
                fix="the checkpoint does not fit its config.json: make it again",
            )


def codec_to_dict(codec: Codec) -> dict[str, Any]:
    """``{"type": ..., **fields}``: how a checkpoint's ``quantization_config`` writes a codec."""
    return {"type": codec.type, **dataclasses.asdict(codec)}


def codec_from_dict(config: Mapping[str, Any]) -> Codec:
    """Build the codec that :func:`codec_to_dict` wrote, with the class that an installed plugin registered for its
    ``type``.

    Raises:
        PluginNotFoundError: no installed plugin provides the type; says which distribution to install.
        CheckpointError: the fields are not those of the codec.
    """
    fields = dict(config)
    codec_class = process_registry().load_codec(str(fields.pop("type", "<none>")))
    try:
        return codec_class(**fields)
    except (TypeError, ValueError, CodecError) as error:
        raise CheckpointError(
            f"codec {dict(config)} in quantization_config is not valid: {error}",
            fix="upgrade the plugin, or make the checkpoint again",
        ) from error
