"""Snowflake Arctic in vLLM, which included it until 0.28.

Read in vllm 0.32.0; modeled on its ``models/mixtral.py``. For the equations of a layer, see :mod:`.hf`.

The branches of a hybrid layer are computed one after another here, and each is reduced over tensor parallel processes
separately.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_ep_group, get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import MixtureOfExperts, SupportsLoRA, SupportsPP, SupportsQuant
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.patches import replaced
from arctic_plugins_moe.configuration import ArcticConfig

__all__ = ["ArcticForCausalLM"]

_MAPPER = WeightsMapper(
    orig_to_new_stacked={  # experts' w1 and w3 are fused by their own layer
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
        ".residual_mlp.w1": (".residual_mlp.w13", 0),
        ".residual_mlp.w3": (".residual_mlp.w13", 1),
        ".mlp.w1": (".mlp.w13", 0),
        ".mlp.w3": (".mlp.w13", 1),
    }
)


class ArcticMLP(nn.Module):
    """``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, config: ArcticConfig, intermediate_size: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        options = {"bias": False, "quant_config": vllm_config.quant_config}
        self.w13 = MergedColumnParallelLinear(
            config.hidden_size, [intermediate_size] * 2, prefix=f"{prefix}.w13", **options
        )
        self.w2 = RowParallelLinear(intermediate_size, config.hidden_size, prefix=f"{prefix}.w2", **options)
        self.act_fn = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.w13(x)
        x, _ = self.w2(self.act_fn(x))
        return x


@contextmanager
def _adapters_elsewhere(vllm_config: VllmConfig, prefix: str) -> Iterator[None]:
    """On CPU, build experts as if there were no adapters.

    For experts in a model with adapters, vLLM selects Triton kernels (``layers/fused_moe/oracle/unquantized.py``), even
    if ``target_modules`` excludes experts. Triton does not support CPUs.

    Raises:
        ConfigError: adapters of experts are requested.
    """
    adapters = vllm_config.lora_config
    if adapters is None or not current_platform.is_cpu():
        yield
        return
    if adapters.target_modules is None or "experts" in adapters.target_modules:
        raise ConfigError(
            f"{prefix}: vLLM 0.32 cannot compute adapters of experts on CPU",
            expected="adapters of other modules",
            fix="name these modules: --lora-target-modules q_proj k_proj v_proj o_proj",
        )
    why = "avoids Triton kernels for experts without adapters; no option selects the kernels"
    with replaced(vllm_config, "lora_config", None, why=why, read_in="vllm 0.32.0"):
        yield


class ArcticMoE(nn.Module):
    """A mixture of experts, or a dense MLP in non-MoE layers.

    Raises:
        ConfigError: experts would be spread over processes, and vLLM cannot compute that.
    """

    def __init__(self, config: ArcticConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.is_mixture = config.is_mixture(layer)
        if not self.is_mixture:
            self.mlp = ArcticMLP(config, config.intermediate_size, vllm_config, f"{prefix}.mlp")
            return
        parallel = vllm_config.parallel_config
        self.gate = GateLinear(config.hidden_size, config.num_local_experts, prefix=f"{prefix}.gate")
        with _adapters_elsewhere(vllm_config, prefix):
            self.experts = FusedMoEFactory(
                num_experts=config.num_local_experts,
                top_k=config.num_experts_per_tok,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                renormalize=config.num_experts_per_tok > 1,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.experts",
                enable_eplb=parallel.enable_eplb,
                num_redundant_experts=parallel.eplb_config.num_redundant_experts,
                ckpt_names=("w1", "w2", "w3"),
            )
        # layers/fused_moe/experts/cpu_moe.py does not know which experts this process holds, and crashes by reading
        # past them.
        if current_platform.is_cpu() and get_ep_group().world_size > 1 and parallel.enable_expert_parallel:
            method = self.experts.routed_experts.quant_method
            if isinstance(method, UnquantizedFusedMoEMethod):
                raise ConfigError(
                    f"{prefix}: vLLM 0.32 cannot spread plain experts over processes on CPU",
                    expected="encoded experts",
                    fix="leave --enable-expert-parallel out, or encode the experts ('arctic quantize', or 'arctic "
                    "serve --plugins fp8')",
                )

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_mixture:
            return self.mlp(x)
        logits, _ = self.gate(x)
        return self.experts(x, logits)


class ArcticAttention(nn.Module):
    """Grouped-query attention with rotary positions; q, k and v are in one matrix.

    Raises:
        ConfigError: the heads cannot be split over the processes.
    """

    def __init__(self, config: ArcticConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        heads, kv_heads, size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            get_tensor_model_parallel_world_size(),
        )
        if heads % size or max(kv_heads, size) % min(kv_heads, size):
            raise ConfigError(
                f"{heads} attention heads and {kv_heads} key-value heads cannot be split over {size} processes",
                expected="a divisor of the former, and a divisor or multiple of the latter",
                fix="change --tensor-parallel-size",
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        own, own_kv = (
            heads // size,
            max(1, kv_heads // size),
        )  # if there are more processes than key-value heads, several hold the same one
        self.sizes = [own * head_dim, own_kv * head_dim, own_kv * head_dim]
        options = {"bias": False, "quant_config": vllm_config.quant_config}
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, head_dim, heads, kv_heads, prefix=f"{prefix}.qkv_proj", **options
        )
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, prefix=f"{prefix}.o_proj", **options)
        self.rotary_emb = get_rope(
            head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            is_neox_style=True,
        )
        self.attn = Attention(
            own,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=own_kv,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(x)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        y, _ = self.o_proj(self.attn(q, k, v))
        return y


class ArcticDecoderLayer(nn.Module):
    """A decoder layer; for its equations, see :mod:`.hf`."""

    def __init__(self, config: ArcticConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.self_attn = ArcticAttention(config, vllm_config, f"{prefix}.self_attn")
        self.block_sparse_moe = ArcticMoE(
            config, extract_layer_index(prefix), vllm_config, f"{prefix}.block_sparse_moe"
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.is_hybrid = bool(config.parallel_attn_mlp_res) and self.block_sparse_moe.is_mixture
        if self.is_hybrid:
            self.residual_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.residual_mlp = ArcticMLP(config, config.hidden_size, vllm_config, f"{prefix}.residual_mlp")

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        a = x + self.self_attn(positions, self.input_layernorm(x))
        if self.is_hybrid:
            return (
                a
                + self.residual_mlp(self.residual_layernorm(a))
                + self.block_sparse_moe(self.post_attention_layernorm(x))
            )
        return a + self.block_sparse_moe(self.post_attention_layernorm(a))


@support_torch_compile
class ArcticModel(nn.Module):
    """The layers of the decoder in this pipeline stage."""

    hf_to_vllm_mapper = _MAPPER

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        if config.hidden_act != "silu":
            raise CheckpointError(
                f"hidden_act is {config.hidden_act!r}",
                expected="'silu', as in every Arctic model",
                fix="correct config.json",
            )
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: ArcticDecoderLayer(config, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    # support_torch_compile reads the annotations to find dynamic dimensions; it needs types, not strings, so this
    # module does not import annotations from __future__.
    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            x = inputs_embeds if input_ids is None or inputs_embeds is not None else self.embed_input_ids(input_ids)
        else:
            assert intermediate_tensors is not None
            x = intermediate_tensors["hidden_states"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x = layer(positions, x)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x})
        return self.norm(x)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class ArcticForCausalLM(nn.Module, SupportsLoRA, SupportsPP, SupportsQuant, MixtureOfExperts):
    """The language model, which vLLM finds by the name in ``architectures`` of ``config.json``."""

    hf_to_vllm_mapper = _MAPPER
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "w13": ["w1", "w3"]}
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = ArcticModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        mixtures = [layer.block_sparse_moe for layer in self.model.layers if not isinstance(layer, PPMissingLayer)]
        # MixtureOfExperts requires these attributes for load balancing. A pipeline stage may have no mixture.
        self.moe_layers = [mixture.experts for mixture in mixtures if mixture.is_mixture]
        self.num_moe_layers = len(self.moe_layers)
        self.expert_weights: Any = []
        self.num_expert_groups, self.num_shared_experts = 1, 0
        self.num_logical_experts = self.num_routed_experts = config.num_local_experts
        self.num_redundant_experts = vllm_config.parallel_config.eplb_config.num_redundant_experts
        self.num_physical_experts = self.num_logical_experts + self.num_redundant_experts
        self.num_local_physical_experts = self.num_physical_experts // get_ep_group().world_size

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        """Update the expert counts when processes join or leave (elastic expert parallelism)."""
        self.num_physical_experts, self.num_local_physical_experts = num_physical_experts, num_local_physical_experts
        self.num_redundant_experts = num_physical_experts - self.num_logical_experts
        for experts in self.moe_layers:
            experts.update_expert_map()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
