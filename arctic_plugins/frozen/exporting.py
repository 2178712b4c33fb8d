"""Exporters: encoded weights in the formats of other libraries, for people who cannot install this one where they serve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from arctic_plugins.frozen.codec import Buffers, Codec

__all__ = ["Exporter"]


class Exporter(ABC):
    """Subclass for each format, and register the class under the format's name with ``registry.exporter``."""

    @abstractmethod
    def quantization_config(self, codecs: Mapping[str, Codec], plain: Sequence[str]) -> dict[str, Any]:
        """What stands in ``config.json`` under ``quantization_config``.

        Args:
            codecs: name of every encoded module -> its codec.
            plain: names of the linear modules that are not encoded.

        Raises:
            CodecError: the format cannot hold what one of the codecs encodes; names the module. Called before weights are read.
        """

    @abstractmethod
    def tensors(self, codec: Codec, buffers: Buffers, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The tensors of a module with the weight ``shape`` (N, K): name after the module's own (``weight``, ``weight_scale``) -> tensor.

        Raises:
            CodecError: the format cannot hold these values.
        """
