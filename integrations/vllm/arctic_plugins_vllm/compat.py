"""Every import from vLLM, in one place. Read in vllm 0.32.0."""

from __future__ import annotations

from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

__all__ = [
    "LinearBase",
    "LinearMethodBase",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "UnquantizedLinearMethod",
    "VocabParallelEmbedding",
    "is_registered",
    "register_quantization_config",
    "set_weight_attrs",
]


def is_registered(method: str) -> bool:
    """Whether a quantization method of that name is known, in-tree or registered."""
    return method in QUANTIZATION_METHODS
