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

from arctic_acme.configuration import AcmeConfig

__all__ = ["AcmeForCausalLM", "AcmeModel"]


class AcmeDecoderLayer(LlamaDecoderLayer):
    """A parallel layer, with one norm."""

    def __init__(self, config: AcmeConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.post_attention_layernorm

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]  # all else by keyword
        normalized = self.input_layernorm(hidden_states)
        attention, _ = self.self_attn(hidden_states=normalized, **kwargs)
        return hidden_states + attention + self.mlp(normalized)


class AcmePreTrainedModel(LlamaPreTrainedModel):
    """Base of the model classes."""

    config: AcmeConfig
    config_class = AcmeConfig
    _no_split_modules = ["AcmeDecoderLayer"]
    _can_record_outputs = {"hidden_states": AcmeDecoderLayer, "attentions": LlamaAttention}


class AcmeModel(AcmePreTrainedModel, LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: AcmeConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(AcmeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()


class AcmeForCausalLM(AcmePreTrainedModel, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: AcmeConfig) -> None:
        super().__init__(config)
        self.model = AcmeModel(config)
        self.post_init()
