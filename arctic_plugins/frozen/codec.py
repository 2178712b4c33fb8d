"""Codecs: how a frozen weight becomes bytes and back. Pure functions of their configuration, used by both hosts."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import CheckpointError, CodecError
from arctic_plugins.frozen.scratch import take_scratch

__all__ = ["Buffers", "Codec", "TensorSpec", "check_buffers", "codec_from_dict", "codec_to_dict"]

Buffers = Mapping[str, Tensor]
"""Suffix -> tensor. The suffix follows ``weight`` in a parameter's name: ``""`` is the suffix of the codes,
``"_scale"`` that of the scales.
"""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data."""

    shape: tuple[int, ...]
    """Its shape."""
    dtype: torch.dtype
    """Its dtype."""
    k_dim: int | None = None
    """The dimension that corresponds to the weight's K, along which it can be split (on group borders); None if there
    is none.
    """

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Codec(ABC):
    """A way to encode weights ``[*lead, N, K]``.

    Subclass it as a frozen dataclass whose fields are the codec's whole configuration.

    The **row law**: every buffer is ``[*lead, N, ...]``, and slicing the dimensions up to N selects those rows (or
    experts). Tensor parallelism along N, fused q/k/v and decoding only some experts follow from it. Codes never have
    the weight's own shape ``[N, K]``, so that a host without the plugin stops with a shape error instead of reading
    bytes as numbers.

    To add a codec, implement :meth:`layout`, :meth:`encode` and :meth:`decode`, register the class under :attr:`type`
    in the plugin's ``register`` hook, and claim modules with an instance of it. :meth:`linear`, :meth:`grad_input` and
    their counterparts for experts can be overridden with fused versions. These should be torch operators, which
    compilers leave as they are.
    """

    type: ClassVar[str]
    """The name of the codec in checkpoints, under the key ``type``.

    .. versionadded:: 0.1
    """

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Return the buffers that a weight of ``shape`` becomes.

        Raises:
            CodecError: weights of this shape cannot be encoded.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Encode ``weight`` (any floating dtype) into the buffers of :meth:`layout`.

        Raises:
            CodecError: the weight contains NaN or infinite values.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def decode(
        self, buffers: Buffers, shape: tuple[int, ...], dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Tensor:
        """Decode to ``shape`` and ``dtype``, into the contiguous ``out`` if it is given.

        .. versionadded:: 0.1
        """

    def linear(self, x: Tensor, buffers: Buffers, shape: tuple[int, int]) -> Tensor:
        """Return ``x [..., K] @ decode(buffers).T`` in the dtype of ``x``.

        .. versionadded:: 0.1
        """
        return torch.nn.functional.linear(
            x, self.decode(buffers, shape, x.dtype, out=take_scratch(shape, x.dtype, x.device))
        )

    def grad_input(self, grad: Tensor, buffers: Buffers, shape: tuple[int, int]) -> Tensor:
        """Return ``grad [..., N] @ decode(buffers)`` in the dtype of ``grad``.

        It is the gradient of :meth:`linear` with respect to ``x``.

        .. versionadded:: 0.1
        """
        return grad @ self.decode(buffers, shape, grad.dtype, out=take_scratch(shape, grad.dtype, grad.device))

    def linear_experts(self, x: Tensor, buffers: Buffers, shape: tuple[int, int, int], counts: Tensor) -> Tensor:
        """Compute :meth:`linear` with one matrix per expert.

        ``x [M, K]`` is sorted by expert; ``counts``, int64 ``[E]`` on the device of ``x``, holds the number of rows of
        each expert. Rows after those of the last expert belong to none, and their results are zero. ``buffers`` are
        those of a weight of ``shape`` ``(E, N, K)``; experts without rows are not read.

        The default copies ``counts`` to the host, which waits for a GPU. A kernel for all experts avoids that.

        .. versionadded:: 0.1
        """
        return _by_expert(self.linear, x, buffers, shape, counts, shape[1])

    def grad_input_experts(self, grad: Tensor, buffers: Buffers, shape: tuple[int, int, int], counts: Tensor) -> Tensor:
        """Compute :meth:`grad_input` in the same way: ``grad [M, N]`` -> ``[M, K]``.

        .. versionadded:: 0.1
        """
        return _by_expert(self.grad_input, grad, buffers, shape, counts, shape[2])

    @property
    def k_border(self) -> int:
        """The weight may be split along K at multiples of this number (tensor parallelism); 1 if it may be anywhere.

        .. versionadded:: 0.1
        """
        return 1

    def describe(self) -> str:
        """Return a description for users, such as ``fp8 (bits 8, group_size channel)``.

        .. versionadded:: 0.1
        """
        fields = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(self).items())
        return f"{self.type} ({fields})" if fields else self.type

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the number of bytes of an encoded weight of ``shape``.

        .. versionadded:: 0.1
        """
        return sum(spec.nbytes for spec in self.layout(shape).values())


def _by_expert(
    product: Callable[[Tensor, Buffers, tuple[int, int]], Tensor],
    rows: Tensor,
    buffers: Buffers,
    shape: tuple[int, int, int],
    counts: Tensor,
    width: int,
) -> Tensor:
    """Apply ``product`` to every expert's rows with its own buffers, which are slices by the row law.

    ``width`` is the number of columns of the result.
    """
    result, first = rows.new_zeros(len(rows), width), 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            own = {suffix: buffer[expert] for suffix, buffer in buffers.items()}
            result[first : first + count] = product(rows[first : first + count], own, shape[1:])
            first += count
    return result


def check_buffers(codec: Codec, buffers: Buffers, shape: tuple[int, ...], name: str) -> None:
    """Check that ``buffers`` have the layout that ``codec`` gives a weight of ``shape``.

    Hosts do not check the shapes of quantized weights.

    Raises:
        CheckpointError: the message names the tensor, and the shape and dtype found and expected.
    """
    for suffix, spec in codec.layout(shape).items():
        found = buffers.get(suffix)
        if found is None:
            raise CheckpointError(
                f"{name}{suffix} is missing from the checkpoint", fix="the checkpoint is incomplete: create it again"
            )
        if tuple(found.shape) != spec.shape or found.dtype != spec.dtype:
            raise CheckpointError(
                f"{name}{suffix} is {found.dtype} {tuple(found.shape)}",
                expected=f"{spec.dtype} {spec.shape} for {codec}",
                fix="the checkpoint does not match its config.json: create it again",
            )


def codec_to_dict(codec: Codec) -> dict[str, Any]:
    """Return a codec as it is written in a checkpoint's ``quantization_config``: ``{"type": ..., **fields}``."""
    return {"type": codec.type, **dataclasses.asdict(codec)}


def codec_from_dict(config: Mapping[str, Any]) -> Codec:
    """Build the codec that :func:`codec_to_dict` wrote, with the class that a plugin registered for its ``type``.

    Raises:
        PluginNotFoundError: no installed plugin provides the type; the message names the distribution to install.
        CheckpointError: the fields are not those of the codec.
    """
    fields = dict(config)
    codec_class = process_registry().load_codec(str(fields.pop("type", "<none>")))
    try:
        return codec_class(**fields)
    except (TypeError, ValueError, CodecError) as error:
        raise CheckpointError(
            f"codec {dict(config)} in quantization_config is not valid: {error}",
            fix="upgrade the plugin, or create the checkpoint again",
        ) from error
