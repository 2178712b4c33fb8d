"""Frozen base weights: encoded bytes (a codec's) somewhere (a placement's), in layers that train what is added to
them.
"""

from arctic_plugins.frozen.codec import Buffers, Codec, TensorSpec, codec_from_dict, codec_to_dict
from arctic_plugins.frozen.codecs import METHOD, ModuleCodecs
from arctic_plugins.frozen.dispatch import Exchange, ExpertsDispatch, Stay, local_parameters
from arctic_plugins.frozen.experts import FrozenExperts, Mixture, mix_experts, piece_sizes, start_experts
from arctic_plugins.frozen.linear import FrozenLinear
from arctic_plugins.frozen.module import FrozenModule, FrozenWeight
from arctic_plugins.frozen.placement import FetchedHandle, Handle, LeaseOrder, Placement, Prefetch, chain
from arctic_plugins.frozen.plain import PlainCodec

__all__ = [
    "METHOD",
    "Buffers",
    "Codec",
    "Exchange",
    "ExpertsDispatch",
    "FetchedHandle",
    "FrozenExperts",
    "FrozenLinear",
    "FrozenModule",
    "FrozenWeight",
    "Handle",
    "LeaseOrder",
    "Mixture",
    "ModuleCodecs",
    "Placement",
    "PlainCodec",
    "Prefetch",
    "Stay",
    "TensorSpec",
    "chain",
    "codec_from_dict",
    "codec_to_dict",
    "local_parameters",
    "mix_experts",
    "piece_sizes",
    "start_experts",
]
