"""Snowflake Arctic in transformers, which does not include it. Read in transformers 5.19.0.

The parts that Arctic shares with Mixtral are Mixtral's. A layer with input x computes::

    a   = x + attention(input_layernorm(x))
    # dense layers, and mixtures without the residual:
    out = a + ffn(post_attention_layernorm(a))
    # dense-MoE hybrid layers:
    out = a + residual_mlp(residual_layernorm(a)) + mixture(post_attention_layernorm(x))

The mixture of a hybrid layer reads the layer's *input*, so tokens travel to other processes while attention and the
residual are computed. The equations and the names of weights are from Snowflake's ``modeling_arctic.py`` (transformers
fork, commit 2d05ff8).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightTransform
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralForCausalLM,
    MixtralModel,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralTopKRouter,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from arctic_plugins.frozen import ExpertsDispatch, Mixture
from arctic_plugins_moe.configuration import ArcticConfig
from arctic_plugins_moe.experts import IMPLEMENTATION, mix_plain, start_plain
from arctic_plugins_moe.router import load_balancing_loss, z_loss

__all__ = [
    "ArcticForCausalLM",
    "ArcticForQuestionAnswering",
    "ArcticForSequenceClassification",
    "ArcticForTokenClassification",
    "ArcticModel",
]


class ArcticMLP(nn.Module):
    """``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, config: ArcticConfig, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


@use_experts_implementation
class ArcticExperts(nn.Module):
    """Experts with ``gate_up_proj [E, 2I, K]`` (w1 above w3) and ``down_proj [E, K, I]`` (w2).

    Checkpoints have one matrix per expert. The class must be decorated in the module of the model: transformers looks
    for the decorator in its source.
    """

    def __init__(self, config: ArcticConfig) -> None:
        super().__init__()
        self.num_experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return mix_plain(self, hidden_states, top_k_index, top_k_weights)

    def start(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Mixture | None:
        """Start the same computation in steps, so that others can run in between.

        Returns None if the experts implementation does not support steps.
        """
        config: Any = self.config
        ours = config._experts_implementation in (None, "eager", IMPLEMENTATION)
        return start_plain(self, hidden_states, top_k_index, top_k_weights) if ours else None


class ArcticRouter(MixtralTopKRouter):
    """Router that takes the softmax in float32 over all experts and selects the top k; renormalizes only if k > 1."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights, index = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, index


class ArcticMoE(nn.Module):
    """A mixture of experts, or a dense MLP in non-MoE layers."""

    def __init__(self, config: ArcticConfig, layer: int) -> None:
        super().__init__()
        self.is_mixture = config.is_mixture(layer)
        if self.is_mixture:
            self.gate, self.experts = ArcticRouter(config), ArcticExperts(config)
        else:
            self.mlp = ArcticMLP(config, config.intermediate_size)

    def start(self, x: Tensor) -> Mixture | Tensor:
        """Route ``x [..., K]`` and start sending it to its experts. If the result is a Tensor, it is already final."""
        flat = x.reshape(-1, x.shape[-1])
        _, weights, index = self.gate(flat)
        # accelerate's hooks fetch weights from the disk only around a whole forward pass (1.15, hooks.py).
        start = None if hasattr(self.experts, "_hf_hook") else getattr(self.experts, "start", None)
        mixture = None if start is None else start(flat, index, weights)
        return self.experts(flat, index, weights) if mixture is None else mixture

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_mixture:
            return self.mlp(x)
        mixture = self.start(x)
        return (mixture.finish() if isinstance(mixture, Mixture) else mixture).view(x.shape)


class ArcticDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer; the module's docstring contains the equations."""

    def __init__(self, config: ArcticConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MixtralAttention(config, layer_idx)
        self.block_sparse_moe = ArcticMoE(config, layer_idx)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.is_hybrid = bool(config.parallel_attn_mlp_res) and self.block_sparse_moe.is_mixture
        if self.is_hybrid:
            self.residual_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.residual_mlp = ArcticMLP(config, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        x = hidden_states
        mixture = self.block_sparse_moe.start(self.post_attention_layernorm(x)) if self.is_hybrid else None
        attention, _ = self.self_attn(
            hidden_states=self.input_layernorm(x),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        a = x + attention
        if mixture is None:
            return a + self.block_sparse_moe(self.post_attention_layernorm(a))
        if isinstance(mixture, Mixture):
            mixture.compute()
        residual = a + self.residual_mlp(self.residual_layernorm(a))
        return residual + (mixture.result() if isinstance(mixture, Mixture) else mixture).view(x.shape)


class ArcticPreTrainedModel(MixtralPreTrainedModel):
    """Base of the model classes."""

    config: ArcticConfig
    config_class = ArcticConfig
    _no_split_modules = ["ArcticDecoderLayer"]
    _can_compile_fullgraph = False
    _can_record_outputs = {
        "router_logits": OutputRecorder(ArcticRouter, index=0),
        "hidden_states": ArcticDecoderLayer,
        "attentions": MixtralAttention,
    }

    @staticmethod
    def checkpoint_conversions() -> list[WeightTransform]:
        """Return the conversions between Snowflake's weight names and the model's, in both directions."""
        return [
            WeightConverter(
                [".experts.*.w1.weight", ".experts.*.w3.weight"],
                ".experts.gate_up_proj",
                [MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter([".experts.*.w2.weight"], ".experts.down_proj", [MergeModulelist(dim=0)]),
        ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ArcticExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)


class ArcticModel(ArcticPreTrainedModel, MixtralModel):
    """The decoder without a head."""

    def __init__(self, config: ArcticConfig) -> None:
        layers = config.num_hidden_layers
        config.num_hidden_layers = 0  # so that Mixtral's layers are not created only to be replaced
        try:
            MixtralModel.__init__(self, config)
        finally:
            config.num_hidden_layers = layers
        self.layers = nn.ModuleList(ArcticDecoderLayer(config, layer) for layer in range(layers))
        self.post_init()


class ArcticForCausalLM(ArcticPreTrainedModel, MixtralForCausalLM):
    """The language model. Its ``aux_loss`` is the load balancing loss, summed over layers.

    ``loss`` also includes the z-loss if its coefficient is not 0.
    """

    def __init__(self, config: ArcticConfig) -> None:
        ArcticPreTrainedModel.__init__(self, config)
        self.model = ArcticModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run the model like ``MixtralForCausalLM.forward``.

        With ``output_router_logits`` (here or in the config), the auxiliary losses are computed and added to ``loss``,
        each with its coefficient. If the Trainer passes the number of labels in a step (``num_items_in_batch``), they
        are weighted by this batch's share of them, so that over a step's accumulated batches and processes they average
        in the same way as the loss on tokens.
        """
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=wanted,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        assert outputs.last_hidden_state is not None
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if wanted and outputs.router_logits:
            dispatches = (getattr(module, "dispatch", None) for module in self.modules())
            dispatch: ExpertsDispatch | None = next((found for found in dispatches if found is not None), None)
            aux_loss = load_balancing_loss(
                outputs.router_logits, self.config.num_experts_per_tok, attention_mask, dispatch
            )
            if loss is not None:
                added = self.config.router_aux_loss_coef * aux_loss
                if self.config.router_z_loss_coef:
                    added = added + self.config.router_z_loss_coef * z_loss(outputs.router_logits, attention_mask)
                loss = loss + _share(labels, kwargs.get("shift_labels"), kwargs.get("num_items_in_batch")) * added.to(
                    loss.device
                )
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=cast("torch.FloatTensor | None", aux_loss),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class ArcticForSequenceClassification(GenericForSequenceClassification, ArcticPreTrainedModel):
    """The decoder with a classifier of the last token."""


class ArcticForTokenClassification(GenericForTokenClassification, ArcticPreTrainedModel):
    """The decoder with a classifier of every token."""


class ArcticForQuestionAnswering(GenericForQuestionAnswering, ArcticPreTrainedModel):
    """The decoder with the start and the end of an answer."""


def _share(
    labels: Tensor | None, shift_labels: Tensor | None, num_items_in_batch: Tensor | int | None
) -> Tensor | float:
    """Return this batch's share of a step's labels.

    Labels are shifted by one, unless they are shifted already (``loss/loss_utils.py``).
    """
    if labels is None or num_items_in_batch is None:
        return 1.0
    return ((labels[..., 1:] if shift_labels is None else shift_labels) != -100).sum() / num_items_in_batch
