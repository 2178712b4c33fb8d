"""Encoded weights in the formats of other libraries.

Exporters write them, for users who cannot install this library. Converters read them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from arctic_plugins.frozen.codec import Buffers, Codec

__all__ = ["Converter", "Exporter"]


class Exporter(ABC):
    """A writer of another library's format.

    Subclass it for each format, and register the class under the format's name with ``registry.exporter``.
    """

    exact: ClassVar[bool] = False
    """Whether the format's readers compute what the codec computes: the same codes and scales, with activations rounded
    as the codec rounds them, and nothing rounded again. A host may then use its own kernels for the format on weights
    of the codecs that :meth:`quantization_config` accepts. Its tensors must obey the row law.

    .. versionadded:: 0.1
    """

    @abstractmethod
    def quantization_config(self, codecs: Mapping[str, Codec], plain: Sequence[str]) -> dict[str, Any]:
        """Return the value of ``quantization_config`` in ``config.json``. Called before weights are read.

        Args:
            codecs: name of every encoded module -> its codec.
            plain: names of the linear modules that are not encoded.

        Raises:
            CodecError: the format cannot hold what one of the codecs encodes; the message names the module.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def tensors(self, codec: Codec, buffers: Buffers, shape: tuple[int, int]) -> dict[str, Tensor]:
        """Return the tensors of a module whose weight has the shape ``shape`` (N, K).

        The keys follow the module's name: ``weight``, ``weight_scale``.

        Raises:
            CodecError: the format cannot hold these values.

        .. versionadded:: 0.1
        """


class Converter(ABC):
    """A reader of another library's format.

    Subclass it for each format, and register the class under the format's name with ``registry.converter``. ``arctic
    convert`` rewrites checkpoints with it, and vLLM reads them through it under the format's name.

    Args:
        config: ``quantization_config`` of the checkpoint's ``config.json``, or the content of one of
            :attr:`config_files`.

    Raises:
        CheckpointError: the config lacks what the format needs.
    """

    config_files: ClassVar[tuple[str, ...]] = ()
    """Names of files next to ``config.json`` that may describe the quantization if ``config.json`` does not.

    .. versionadded:: 0.1
    """

    @abstractmethod
    def __init__(self, config: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def codec(self, shape: tuple[int, ...]) -> Codec:
        """Return the codec of a weight of ``shape`` after conversion. Raises CodecError if no codec can hold it.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def rows(self, weight: Tensor, in_features: int) -> int:
        """Return N of the stored ``weight``, which has ``in_features`` inputs.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def buffers(self, weight: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the buffers of :meth:`codec` for the stored ``weight``.

        Raises:
            CodecError: the weight is not what the format specifies.

        .. versionadded:: 0.1
        """
