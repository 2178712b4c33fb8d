"""All imports from vLLM, in one place. Read in vllm 0.32.0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from vllm import EngineArgs, ModelRegistry
from vllm.config import get_current_vllm_config_or_none, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    get_tp_group,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.logger import init_logger
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
)
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

__all__ = [
    "ROPE_TYPES",
    "DefaultModelLoader",
    "EngineArgs",
    "FusedMoEMethodBase",
    "LinearBase",
    "LinearMethodBase",
    "ModelRegistry",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "RotaryEmbedding",
    "RoutedExperts",
    "ShardedStateLoader",
    "UnquantizedEmbeddingMethod",
    "UnquantizedLinearMethod",
    "VocabParallelEmbedding",
    "activate_experts",
    "ask",
    "chosen_kernel",
    "cleanup_dist_env_and_memory",
    "expert_activation",
    "get_tp_group",
    "in_tree_config",
    "init_distributed_environment",
    "init_logger",
    "initialize_model",
    "initialize_model_parallel",
    "is_registered",
    "loading",
    "model_dtype",
    "note_for_compilation",
    "on_gpu",
    "plain_tokens",
    "register_quantization_config",
    "rotary_embedding",
    "says",
    "set_current_vllm_config",
    "set_weight_attrs",
    "skips_rounding",
    "stored_dtype",
]


ROPE_TYPES = frozenset({"default", "linear", "dynamic", "ntk", "yarn", "llama3", "longrope", "proportional"})
"""RoPE types of language models that ``get_rope`` supports itself."""


def is_registered(method: str) -> bool:
    """Return whether vLLM has a quantization method of that name, in-tree or registered."""
    return method in QUANTIZATION_METHODS


def says(key: str) -> bool:
    """Return whether ``key`` is set to a true value in the config of the model that is being built."""
    config = get_current_vllm_config_or_none()
    return (
        config is not None
        and config.model_config is not None
        and bool(getattr(config.model_config.hf_config, key, False))
    )


def loading() -> tuple[str, int, bool]:
    """Return how the model that is being built is loaded.

    Returns:
        The checkpoint, the number of tensor parallel processes, and whether each process reads its own files.
    """
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return "", 1, False
    by_process = config.load_config.load_format in ("sharded_state", "runai_streamer_sharded")
    return config.model_config.model, config.parallel_config.tensor_parallel_size, by_process


def model_dtype() -> torch.dtype | None:
    """Return the compute dtype of the model that is being built."""
    config = get_current_vllm_config_or_none()
    return None if config is None or config.model_config is None else config.model_config.dtype


def stored_dtype() -> torch.dtype | None:
    """Return the dtype that the checkpoint of the model being built specifies; None if it does not, or not on CPU."""
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None or not current_platform.is_cpu():
        return None
    found = getattr(config.model_config.hf_text_config, "dtype", None) or getattr(
        config.model_config.hf_config, "dtype", None
    )
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else None


def expert_activation(layer: Any) -> dict[str, Any]:
    """Return the parameters of ``layer`` (a RoutedExperts) that :func:`activate_experts` needs, as JSON types.

    They are those of ``unquantized_fused_moe_method.py``.
    """
    gate = FusedMoEQuantConfig.make(
        gemm1_alpha=layer.swiglu_alpha, gemm1_beta=layer.swiglu_beta, gemm1_clamp_limit=layer.swiglu_limit
    )
    return {
        "activation": layer.activation.value,
        **asdict(ApplyMoEActivationConfig.from_configs(layer.moe_config, gate)),
    }


def activate_experts(activation: Mapping[str, Any], rows: Tensor) -> Tensor:
    """Apply the activation and gate of a mixture's experts: ``[M, 2I]`` (``[M, I]`` without a gate) to ``[M, I]``."""
    options = dict(activation)
    kind = MoEActivation.from_str(options.pop("activation"))
    result = rows.new_empty(rows.shape[0], rows.shape[1] // (2 if kind.is_gated else 1))
    if len(rows):
        apply_moe_activation(kind, result, rows.contiguous(), activation_config=ApplyMoEActivationConfig(**options))
    return result


def on_gpu() -> bool:
    """Return whether vLLM runs on NVIDIA or AMD GPUs."""
    return bool(current_platform.is_cuda_alike())


def in_tree_config(method: str) -> type[QuantizationConfig] | None:
    """Return vLLM's own config class for the quantization method ``method``; None if it has none."""
    found = get_quantization_config(method) if is_registered(method) else None
    return found if found is not None and found.__module__.startswith("vllm.") else None


def chosen_kernel(method: Any, layer: Any) -> str | None:
    """Return the names of an in-tree method and of the kernel that it chose for ``layer``; None if it has no kernel.

    Methods for linear layers leave the choice to a scheme, which is an attribute of the layer (``compressed_tensors``).
    """
    from vllm.model_executor.kernels.linear import MPLinearKernel, ScaledMMLinearKernel  # slow to import

    scheme = getattr(layer, "scheme", method)
    kernels = [
        type(value) for value in vars(scheme).values() if isinstance(value, MPLinearKernel | ScaledMMLinearKernel)
    ]
    kernel = kernels[0] if kernels else getattr(method, "experts_cls", None)
    return None if kernel is None else f"{type(scheme).__name__} with {kernel.__name__}"


WEIGHT_ONLY = ("W8A16", "Marlin", "Humming")
"""Parts of the names of schemes and kernels that leave activations as they are, even for formats that round them."""


def skips_rounding(config: Any, kernel: str) -> bool:
    """Return whether ``config`` rounds activations and the chosen ``kernel`` does not.

    Without FP8 units (compute capability below 8.9), vLLM falls back to such kernels (``compressed_tensors.py``,
    ``_get_scheme_from_parts``; ``fused_moe/oracle/fp8.py``).
    """
    schemes = getattr(config, "target_scheme_map", {}).values()
    return any(scheme["input_activations"] for scheme in schemes) and any(name in kernel for name in WEIGHT_ONLY)


def note_for_compilation(key: str, value: str) -> None:
    """Make compiled code that vLLM caches depend on ``value``, which no other part of its config shows."""
    config = get_current_vllm_config_or_none()
    if config is not None and isinstance(config.additional_config, dict):
        config.additional_config[key] = value  # part of VllmConfig.compute_hash


async def ask(
    session: Any,
    url: str,
    model: str,
    prompt: Sequence[int],
    response_length: int,
    *,
    ignore_eos: bool,
    extra_body: Mapping[str, Any],
) -> Any:
    """Send a request to ``/v1/completions`` and time its response, as ``vllm bench serve`` does.

    Args:
        session: an ``aiohttp.ClientSession``.
        url: ends with ``/v1/completions``.
        model: name of a model of the server.
        prompt: token ids.
        response_length: most tokens of the response.
        ignore_eos: whether the response goes on to that length.
        extra_body: more fields of the request.

    Returns:
        vLLM's ``RequestFuncOutput``. ``error`` is a traceback if the request failed. Errors that a server reports in
            the middle of a stream are ignored there, with ``success`` set and ``output_tokens`` 0.
    """
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_completions

    request = RequestFuncInput(
        prompt=list(prompt),
        api_url=url,
        prompt_len=len(prompt),
        output_len=response_length,
        model=model,
        ignore_eos=ignore_eos,
        extra_body=dict(extra_body),
    )
    return await async_request_openai_completions(request, session)


def plain_tokens(tokenizer: str) -> list[int]:
    """Return the ids of the tokens of ``tokenizer`` (a directory or Hub id) that are not special."""
    from vllm.tokenizers import get_tokenizer

    loaded = get_tokenizer(tokenizer)
    special = set(loaded.all_special_ids)
    return [token for token in range(loaded.vocab_size) if token not in special]
