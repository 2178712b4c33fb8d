"""Models small enough to train, save and serve in a test, with a generated tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["LLAMA_LIKE", "MIXTURES", "draw_adapter", "tiny_llama", "tiny_model"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

LLAMA_LIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 168}),
    "mistral": ("mistral", {"sliding_window": 16, "num_key_value_heads": 1}),
    "qwen2": (
        "qwen2",
        {"hidden_size": 128, "intermediate_size": 200, "tie_word_embeddings": True},
    ),  # biases of q, k, v only
    "qwen3": ("qwen3", {"hidden_size": 80}),  # norms of q and k; heads wider than the hidden size
    "phi": (
        "phi",
        {"partial_rotary_factor": 0.5, "hidden_size": 128, "head_dim": 32},
    ),  # biases everywhere, in the head too; layer norms
    "phi3": ("phi3", {"hidden_size": 128, "sliding_window": 16}),  # fused on disk: q, k, v; gate, up
    "gemma": (
        "gemma",
        {"hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 1},
    ),  # tied, norms plus one, scaled embeddings
    "gemma2": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 32}),  # every other layer slides; soft caps
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 16, "query_pre_attn_scalar": 32, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
"""Relatives of Llama, each with its special features: name -> (model_type, config) for :func:`tiny_model`."""

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),  # its names in checkpoints differ from those in the model
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "hidden_size": 128,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 80,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "hidden_size": 128, "intermediate_size": 32}),
}
"""Mixtures of experts: name -> (model_type, config) for :func:`tiny_model`."""


def draw_adapter(model: Any, part: str = "lora_B") -> None:
    """Set the parameters with ``part`` in their names to fixed random values.

    The adapter then changes the output of ``model``.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def tiny_llama(directory: str | Path, **options: Any) -> Path:
    """Call :func:`tiny_model` with the type ``llama``."""
    return tiny_model(directory, "llama", **options)


def tiny_model(
    directory: str | Path,
    model_type: str,
    *,
    auto_class: str = "AutoModelForCausalLM",
    dtype: str = "float32",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a random language model and a byte-level tokenizer with a chat template into ``directory``.

    Args:
        directory: where to write.
        model_type: type as in ``config.json``, of any model whose config names sizes as Llama's does.
        auto_class: class of transformers that makes the model.
        dtype: dtype of the weights on disk.
        seed: seed of the random weights; the same seed gives the same bytes.
        **config: fields of the model's config that differ from the defaults below.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    special = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate([*special, *alphabet])}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
    )
    defaults: dict[str, Any] = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the smallest that vLLM 0.32's CPU attention supports
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "initializer_range": 0.2,  # large enough that greedy answers differ between models
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, auto_class).from_config(
            AutoConfig.for_model(model_type, **{**defaults, **config}), dtype=getattr(torch, dtype)
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
