"""Quantization methods in vLLM: ``arctic``, and a reader for every format that can be converted.

vLLM fuses q/k/v, gate/up and experts. The row law makes that simple: their buffers are stacked along the rows, as vLLM
does with weights, and tensor parallelism takes rows, or slices along K that end at the codec's group borders.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from arctic_plugins.compute import warning_for
from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import CheckpointError, CodecError
from arctic_plugins.frozen import METHOD, Codec, ModuleCodecs
from arctic_plugins.frozen.exporting import Converter
from arctic_plugins.provenance import FILE_NAME, check_files
from arctic_plugins_vllm.checkpoints import ON_THE_FLY, check_names, made_for
from arctic_plugins_vllm.compat import (
    LinearBase,
    QuantizationConfig,
    QuantizeMethodBase,
    RoutedExperts,
    UnquantizedLinearMethod,
    VocabParallelEmbedding,
    loading,
    model_dtype,
    stored_dtype,
)
from arctic_plugins_vllm.embedding import StoredEmbeddingMethod
from arctic_plugins_vllm.experts import EncodedExpertsMethod
from arctic_plugins_vllm.linear import EncodedLinearMethod
from arctic_plugins_vllm.loaders import Reader, convert, encode
from arctic_plugins_vllm.native import Format, are_wanted, formats_of

logger = logging.getLogger(__name__)

__all__ = ["ArcticConfig", "ConvertedConfig"]


def keeps_bfloat16() -> bool:
    """Return whether plain weights stay in bfloat16 while the model computes in float32.

    This requires an installed product that widens them in registers.
    """
    return (
        model_dtype() == torch.float32
        and stored_dtype() == torch.bfloat16
        and process_registry().load_widening_linear() is not None
    )


class CodecConfig(QuantizationConfig):
    """A quantization method whose layers compute with codecs."""

    reader: Reader | None = None
    """Converts a weight in the checkpoint to buffers; None if the checkpoint contains the buffers."""

    def __init__(self) -> None:
        super().__init__()
        self._formats: dict[tuple[Codec, ...], list[Format]] = {}

    def formats(self, *codecs: Codec) -> list[Format]:
        """Return vLLM's own formats that hold the bytes of a layer's ``codecs``; none where the codecs are to compute.

        Raises:
            ConfigError: see :func:`arctic_plugins_vllm.native.are_wanted`.
        """
        if not are_wanted():
            return []
        if codecs not in self._formats:
            self._formats[codecs] = formats_of(codecs, self.packed_modules_mapping)
        return self._formats[codecs]

    def linear_codec(self, layer: nn.Module, prefix: str) -> Codec | None:
        """Return the codec of a linear layer, fused or not; None if it is plain."""
        raise NotImplementedError

    def experts_codecs(self, layer: Any, prefix: str) -> tuple[Codec, Codec] | None:
        """Return the codecs of the two weights of experts; None if they are plain."""
        raise NotImplementedError

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            codecs = self.experts_codecs(layer, prefix)
            if codecs is None:
                return None
            return EncodedExpertsMethod(*codecs, layer, prefix, self.reader, self.formats(*codecs))
        codec = self.linear_codec(layer, prefix)
        if isinstance(layer, LinearBase):
            if codec is None:
                return UnquantizedLinearMethod()
            return EncodedLinearMethod(codec, prefix, self.reader, self.formats(codec))
        if codec is not None and isinstance(layer, VocabParallelEmbedding):
            raise CheckpointError(
                f"{prefix} is encoded",
                expected="a plain output head, the only kind that vLLM serves",
                fix="exclude it and encode again",
            )
        return (
            StoredEmbeddingMethod(torch.bfloat16)
            if isinstance(layer, VocabParallelEmbedding) and keeps_bfloat16()
            else None
        )

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # codecs are torch code and run on any device


class ArcticConfig(CodecConfig):
    """The ``quantization_config`` of a checkpoint.

    See :class:`arctic_plugins.frozen.ModuleCodecs`, which also lists the errors raised.
    """

    def __init__(self, codecs: ModuleCodecs, *, on_the_fly: bool = False) -> None:
        super().__init__()
        self.codecs, self.reader, self.checked = codecs, encode if on_the_fly else None, False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ArcticConfig:
        codecs = ModuleCodecs.from_config({key: value for key, value in config.items() if key != ON_THE_FLY})
        check_names(codecs, "the checkpoint")
        return cls(codecs, on_the_fly=ON_THE_FLY in config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check the files of the checkpoint.

        vLLM calls this with the checkpoint's name before it reads weights; no other method gets the chance.
        """
        if (Path(model_name) / FILE_NAME).is_file():
            check_files(model_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method for ``layer``, after checking the number of processes.

        Raises:
            CheckpointError: the checkpoint was split for another number of processes. vLLM would load it anyway.
        """
        if not self.checked:
            checkpoint, size, by_process = loading()
            made = made_for(Path(checkpoint)) if checkpoint else None
            if made is not None and (made != size or not by_process):
                found = f"tensor_parallel_size {size}" + ("" if by_process else " and another load_format")
                raise CheckpointError(
                    f"{checkpoint} was made for {made} processes and is loaded with {found}",
                    expected=f"tensor_parallel_size {made} and load_format 'sharded_state'",
                    fix="use 'arctic serve', which sets both, or create it again with another --tensor-parallel, or "
                    "without",
                )
            self.checked = True
            if (dtype := model_dtype()) is not None and (
                line := warning_for(dtype, "vLLM's dtype", "pass --dtype float32, as 'arctic serve' does")
            ):
                logger.warning(line)
        return super().get_quant_method(layer, prefix)

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # everything is in config.json

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename modules; vLLM calls this for models whose names differ from transformers' (most multimodal ones)."""
        self.codecs = ModuleCodecs(self.codecs.codecs, hf_to_vllm_mapper.apply_dict(self.codecs.modules))

    def linear_codec(self, layer: nn.Module, prefix: str) -> Codec | None:
        parent, _, leaf = prefix.rpartition(".")
        return self._one_codec(
            [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(leaf, [leaf])]
        )

    def experts_codecs(self, layer: Any, prefix: str) -> tuple[Codec, Codec] | None:
        leaves = [leaf for leaf in (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name) if leaf is not None]
        up = self._one_codec([f"{prefix}.0.{leaf}" for leaf in leaves])
        down = self._codec_of(f"{prefix}.0.{layer.ckpt_down_proj_name}")
        if up is None and down is None:
            return None
        if up is None or down is None:
            raise CheckpointError(
                f"only one weight of {prefix} is encoded", expected="all of them, or none", fix="encode them together"
            )
        return up, down

    def _codec_of(self, module: str) -> Codec | None:
        """Return the codec of a module by vLLM's name of it.

        vLLM adds ``model.`` to the names in checkpoints without a head (vllm 0.32.0, ``models/adapters.py``).
        """
        found = self.codecs.codec_of(module)
        return self.codecs.codec_of(module.removeprefix("model.")) if found is None else found

    def _one_codec(self, parts: list[str]) -> Codec | None:
        codecs = [self._codec_of(part) for part in parts]
        if len(set(codecs)) > 1:
            found = ", ".join(f"{part}: {codec}" for part, codec in zip(parts, codecs, strict=True))
            raise CheckpointError(
                f"vLLM fuses modules with different codecs ({found})",
                expected="one codec",
                fix="encode them in the same way",
            )
        return codecs[0]


class ConvertedConfig(CodecConfig):
    """A format for which a plugin registered a converter, read as by ``arctic convert``; plain weights are encoded."""

    format_name: ClassVar[str]

    def __init__(self, converter: Converter) -> None:
        super().__init__()
        self.converter, self.reader = converter, convert(converter)

    @staticmethod
    def of(name: str) -> type[ConvertedConfig]:
        """Return the class for the format called ``name``."""
        return type(f"{name.title()}Config", (ConvertedConfig,), {"format_name": name})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ConvertedConfig:
        return cls(process_registry().load_converter(cls.format_name)(config))

    @classmethod
    def get_name(cls) -> str:
        return cls.format_name

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return list(process_registry().load_converter(cls.format_name).config_files)

    def linear_codec(self, layer: nn.Module, prefix: str) -> Codec | None:
        return self._codec((layer.output_size, layer.input_size)) if isinstance(layer, LinearBase) else None

    def experts_codecs(self, layer: Any, prefix: str) -> tuple[Codec, Codec] | None:
        config = layer.moe_config
        up, down = (
            self._codec((config.intermediate_size, config.hidden_dim)),
            self._codec((config.hidden_dim, config.intermediate_size)),
        )
        return None if up is None or down is None else (up, down)

    def _codec(self, shape: tuple[int, int]) -> Codec | None:
        try:
            return self.converter.codec(shape)
        except CodecError:
            return None  # the format does not support this shape: the weight must be plain, or vLLM stops
