"""``ArcticConfig``, for both hosts.

Fields and defaults are those of Snowflake's ``configuration_arctic.py`` (transformers fork, commit 2d05ff8).
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MixtralConfig

from arctic_plugins.errors import CheckpointError

__all__ = ["ArcticConfig"]


@strict
class ArcticConfig(MixtralConfig):
    """Configuration of an Arctic model; for the released one, see :meth:`released`.

    Layer i is a mixture if and only if ``(i + 1) % moe_layer_frequency == 0``. A mixture has the dense residual if and
    only if ``parallel_attn_mlp_res`` is true. vLLM's old code calls it ``use_residual``, so checkpoints set both.

    Raises:
        CheckpointError: the two differ, or sizes are inconsistent.
    """

    model_type = "arctic"
    # PreTrainedConfig has None here, and Mixtral's are not annotated.
    base_model_tp_plan = base_model_pp_plan = base_model_ep_plan = None  # type: ignore[assignment]

    num_key_value_heads: int | None = None  # type: ignore[assignment]  # MixtralConfig accepts it, as the number of heads
    max_position_embeddings: int = 4096
    num_experts_per_tok: int = 1
    moe_layer_frequency: int = 2
    parallel_attn_mlp_res: bool | None = None
    use_residual: bool | None = None
    router_z_loss_coef: float = 0.0
    """Weight of ``mean(logsumexp(router logits) ** 2)``, summed over layers (Zoph et al., "ST-MoE", 2022); 0 disables
    it, as in Snowflake's training.
    """
    moe_train_capacity_factor: float = 1.0
    """The value that Snowflake trained with. Nothing here reads it: a capacity is set with the plugin's
    ``capacity_factor``.
    """
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
                expected="the same value: they are two names for one option",
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
                f"num_experts_per_tok is {self.num_experts_per_tok} and num_local_experts is {self.num_local_experts}",
                expected="num_experts_per_tok <= num_local_experts",
                fix="correct config.json",
            )

    def is_mixture(self, layer: int) -> bool:
        """Return whether layer number ``layer`` is a mixture of experts."""
        return (layer + 1) % self.moe_layer_frequency == 0

    @classmethod
    def released(cls, **changes: Any) -> ArcticConfig:
        """Return the config of ``Snowflake/snowflake-arctic-base`` and ``-instruct``, with ``changes`` to its fields.

        The models have 478.6B parameters, of which 17.3B are active.
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
