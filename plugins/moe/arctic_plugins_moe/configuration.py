"""``ArcticConfig``, for both hosts. Fields and defaults are those of Snowflake's ``configuration_arctic.py``
(transformers fork, commit 2d05ff8).
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MixtralConfig

from arctic_plugins.errors import CheckpointError

__all__ = ["ArcticConfig"]


@strict
class ArcticConfig(MixtralConfig):
    """Sizes of an Arctic model. The released one: see :meth:`released`.

    Layer i is a mixture iff ``(i + 1) % moe_layer_frequency == 0``, and then has the dense residual beside it iff
    ``parallel_attn_mlp_res``, which vLLM's old code calls ``use_residual``: checkpoints say both.

    Raises:
        CheckpointError: the two differ, or sizes do not fit each other.
    """

    model_type = "arctic"
    # None in PreTrainedConfig, and Mixtral's are not annotated.
    base_model_tp_plan = base_model_pp_plan = base_model_ep_plan = None  # type: ignore[assignment]

    num_key_value_heads: int | None = None  # type: ignore[assignment]  # MixtralConfig takes it, and counts heads
    max_position_embeddings: int = 4096
    num_experts_per_tok: int = 1
    moe_layer_frequency: int = 2
    parallel_attn_mlp_res: bool | None = None
    use_residual: bool | None = None
    router_z_loss_coef: float = 0.0
    """Weight of ``mean(logsumexp(router logits) ** 2)``, summed over layers (Zoph et al., "ST-MoE", 2022); 0 leaves it
    out, as Snowflake did.
    """
    moe_train_capacity_factor: float = 1.0
    """With which Snowflake trained; read by nothing here: the plugin's ``capacity_factor`` asks for it."""
    moe_eval_capacity_factor: float = 1.0
    moe_min_capacity: int = 0
    moe_token_dropping: bool = True
    enable_expert_tensor_parallelism: bool = False
    attention_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        given = {self.parallel_attn_mlp_res, self.use_residual} - {None}
        if len(given) > 1:
            raise CheckpointError(
                f"parallel_attn_mlp_res is {self.parallel_attn_mlp_res} and use_residual is {self.use_residual}",
                expected="the same: they are two names of one thing",
                fix="correct config.json",
            )
        self.parallel_attn_mlp_res = self.use_residual = given.pop() if given else False
        super().__post_init__(**kwargs)
        for name in ("num_local_experts", "num_experts_per_tok", "moe_layer_frequency"):
            if getattr(self, name) < 1:
                raise CheckpointError(
                    f"{name} is {getattr(self, name)}", expected="at least 1", fix="correct config.json"
                )
        if self.num_experts_per_tok > self.num_local_experts:
            raise CheckpointError(
                f"num_experts_per_tok is {self.num_experts_per_tok} and num_local_experts {self.num_local_experts}",
                expected="no more experts for a token than there are",
                fix="correct config.json",
            )

    def is_mixture(self, layer: int) -> bool:
        """Whether layer number ``layer`` is a mixture of experts."""
        return (layer + 1) % self.moe_layer_frequency == 0

    @classmethod
    def released(cls, **changes: Any) -> ArcticConfig:
        """The sizes of ``Snowflake/snowflake-arctic-base`` and ``-instruct``: 478.6B parameters, 17.3B active;
        ``changes`` override fields.
        """
        sizes: dict[str, Any] = {
            "vocab_size": 32000,
            "hidden_size": 7168,
            "intermediate_size": 4864,
            "num_hidden_layers": 35,
            "num_attention_heads": 56,
            "num_key_value_heads": 8,
            "num_local_experts": 128,
            "num_experts_per_tok": 2,
            "moe_layer_frequency": 1,
            "parallel_attn_mlp_res": True,
            "max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 31998,
            "eos_token_id": 31999,
            "architectures": ["ArcticForCausalLM"],
        }
        return cls(**{**sizes, **changes})
