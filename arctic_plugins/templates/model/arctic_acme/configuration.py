"""``AcmeConfig``, for both hosts."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

__all__ = ["AcmeConfig"]


@strict
class AcmeConfig(LlamaConfig):
    """Configuration with the fields of Llama's."""

    model_type = "acme"
