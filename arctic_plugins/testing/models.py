"""A Llama small enough to train, save and serve in a test, with a tokenizer that it makes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["tiny_llama"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_llama(directory: str | Path, *, dtype: str = "float32", seed: int = 0, **config: Any) -> Path:
    """Write a random Llama and a byte-level tokenizer with a chat template into ``directory``.

    Args:
        directory: where to.
        dtype: of the weights on disk.
        seed: of the random weights; the same seed gives the same bytes.
        **config: fields of ``LlamaConfig`` that differ from the defaults here.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
        "head_dim": 32,  # the smallest that the CPU attention of vLLM 0.32 knows
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "initializer_range": 0.2,  # large enough that greedy answers differ between models
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**defaults, **config})).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
