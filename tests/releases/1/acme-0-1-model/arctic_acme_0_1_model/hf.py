"""The model in transformers. Read in transformers 5.19.0.

It is Llama with parallel layers, as in GPT-J and PaLM: attention and MLP read the same normalized input, ``out = x +
attention(norm(x)) + mlp(norm(x))``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)

from arctic_acme_0_1_model.configuration import Acme01ModelConfig

__all__ = ["Acme01ModelForCausalLM", "Acme01ModelModel"]


class Acme01ModelDecoderLayer(LlamaDecoderLayer):
    """A parallel layer, with one norm."""

    def __init__(self, config: Acme01ModelConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.post_attention_layernorm

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]  # all else by keyword
        normalized = self.input_layernorm(hidden_states)
        attention, _ = self.self_attn(hidden_states=normalized, **kwargs)
        return hidden_states + attention + self.mlp(normalized)


class Acme01ModelPreTrainedModel(LlamaPreTrainedModel):
    """Base of the model classes."""

    config: Acme01ModelConfig
    config_class = Acme01ModelConfig
    _no_split_modules = ["Acme01ModelDecoderLayer"]
    _can_record_outputs = {"hidden_states": Acme01ModelDecoderLayer, "attentions": LlamaAttention}


class Acme01ModelModel(Acme01ModelPreTrainedModel, LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: Acme01ModelConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(Acme01ModelDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()


class Acme01ModelForCausalLM(Acme01ModelPreTrainedModel, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: Acme01ModelConfig) -> None:
        super().__init__(config)
        self.model = Acme01ModelModel(config)
        self.post_init()
