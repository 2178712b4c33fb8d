"""Frozen base weights: bytes that a codec encodes and a placement keeps, in layers that train only what is added."""

from arctic_plugins.frozen.codec import Buffers, Codec, TensorSpec, codec_from_dict, codec_to_dict
from arctic_plugins.frozen.dispatch import DispatchedTokens, ExpertsDispatch, LocalTokens, local_parameters
from arctic_plugins.frozen.experts import (
    FrozenExperts,
    Mixture,
    grouped_linear,
    in_blocks,
    mix_experts,
    piece_sizes,
    start_experts,
)
from arctic_plugins.frozen.exporting import Converter, Exporter
from arctic_plugins.frozen.linear import FrozenLinear
from arctic_plugins.frozen.module import FrozenModule, FrozenWeight
from arctic_plugins.frozen.module_codecs import METHOD, ModuleCodecs
from arctic_plugins.frozen.placement import FetchedHandle, Handle, LeaseOrder, Placement, Prefetch, chain
from arctic_plugins.frozen.plain import PlainCodec
from arctic_plugins.frozen.scratch import take_scratch

__all__ = [
    "METHOD",
    "Buffers",
    "Codec",
    "Converter",
    "DispatchedTokens",
    "ExpertsDispatch",
    "Exporter",
    "FetchedHandle",
    "FrozenExperts",
    "FrozenLinear",
    "FrozenModule",
    "FrozenWeight",
    "Handle",
    "LeaseOrder",
    "LocalTokens",
    "Mixture",
    "ModuleCodecs",
    "Placement",
    "PlainCodec",
    "Prefetch",
    "TensorSpec",
    "chain",
    "codec_from_dict",
    "codec_to_dict",
    "grouped_linear",
    "in_blocks",
    "local_parameters",
    "mix_experts",
    "piece_sizes",
    "start_experts",
    "take_scratch",
]
