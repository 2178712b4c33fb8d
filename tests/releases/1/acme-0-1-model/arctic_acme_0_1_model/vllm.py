"""The model in vLLM. Read in vllm 0.32.0 (``models/llama.py``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

__all__ = ["Acme01ModelForCausalLM"]


class Acme01ModelDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc, unused-ignore]  # where vLLM is not installed, it is Any
    """A parallel layer; see :mod:`.hf`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.post_attention_layernorm

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what the layer adds to its input, and its input. The next layer, or the last norm, adds the two."""
        if residual is not None:
            hidden_states = hidden_states + residual
        normalized = self.input_layernorm(hidden_states)
        added = self.self_attn(positions=positions, hidden_states=normalized) + self.mlp(normalized)
        return added, hidden_states


class Acme01ModelForCausalLM(LlamaForCausalLM):  # type: ignore[misc, unused-ignore]
    """The language model, which vLLM finds by the name in ``architectures`` of ``config.json``."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=Acme01ModelDecoderLayer)
