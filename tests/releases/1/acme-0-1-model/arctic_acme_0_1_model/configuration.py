"""``Acme01ModelConfig``, for both hosts."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

__all__ = ["Acme01ModelConfig"]


@strict
class Acme01ModelConfig(LlamaConfig):
    """Configuration with the fields of Llama's."""

    model_type = "acme-0-1-model"
