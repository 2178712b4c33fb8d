"""Encoded weights in the formats of other libraries: exporters write them, for those who cannot install this one;
converters read them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from arctic_plugins.frozen.codec import Buffers, Codec

__all__ = ["Converter", "Exporter"]


class Exporter(ABC):
    """Subclass for each format, and register the class under the format's name with ``registry.exporter``."""

    @abstractmethod
    def quantization_config(self, codecs: Mapping[str, Codec], plain: Sequence[str]) -> dict[str, Any]:
        """What stands in ``config.json`` under ``quantization_config``.

        Args:
            codecs: name of every encoded module -> its codec.
            plain: names of the linear modules that are not encoded.

        Raises:
            CodecError: the format cannot hold what one of the codecs encodes; names the module. Called before weights
                are read.
        """

    @abstractmethod
    def tensors(self, codec: Codec, buffers: Buffers, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The tensors of a module with the weight ``shape`` (N, K): name after the module's own (``weight``,
        ``weight_scale``) -> tensor.

        Raises:
            CodecError: the format cannot hold these values.
        """


class Converter(ABC):
    """Subclass for each format that ``arctic convert`` reads, and register the class under the format's name with
    ``registry.converter``.

    ``arctic convert`` rewrites checkpoints with it, and vLLM reads them through it under the format's name.

    Args:
        config: ``quantization_config`` of the checkpoint's ``config.json``, or what one of :attr:`config_files` holds.

    Raises:
        CheckpointError: that does not say what the format needs to know.
    """

    config_files: ClassVar[tuple[str, ...]] = ()
    """Names of files beside ``config.json`` that may say how a checkpoint is quantized when that does not."""

    @abstractmethod
    def __init__(self, config: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def codec(self, shape: tuple[int, ...]) -> Codec:
        """The codec that a weight of ``shape`` becomes. Raises CodecError when none can hold it."""

    @abstractmethod
    def rows(self, weight: Tensor, in_features: int) -> int:
        """N of the stored ``weight``, which has ``in_features`` inputs."""

    @abstractmethod
    def buffers(self, weight: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The buffers of :meth:`codec` for the stored ``weight``. Raises CodecError when it is not what the format
        says.
        """
