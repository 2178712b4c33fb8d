"""The ``moe`` plugin: Snowflake Arctic on both hosts, expert-parallel training of mixtures, and router statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from arctic_plugins import Claim, LinearSpec, ModelClasses, Plugin, Registry, hookimpl
from arctic_plugins.errors import ClaimError, ConfigError
from arctic_plugins_moe.config import MoEConfig

__all__ = ["MoE"]


class MoE(Plugin):
    """Mixtures of experts; claims ``experts_dispatch`` if experts are spread over processes or a capacity is set."""

    name = "moe"
    config = MoEConfig
    slots = frozenset({"experts_dispatch"})
    after = frozenset({"weight_codec", "placement", "adapter"})

    options: MoEConfig

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        package = "arctic_plugins_moe"
        registry.experts_function("arctic", f"{package}.experts:mix_plain")
        registry.model(
            "arctic",
            ModelClasses(
                config=f"{package}.configuration:ArcticConfig",
                base=f"{package}.hf:ArcticModel",
                causal_lm=f"{package}.hf:ArcticForCausalLM",
                vllm=f"{package}.vllm:ArcticForCausalLM",
                tokenizer=f"{package}.tokenization:ArcticTokenizer",
                heads={
                    f"AutoModelFor{task}": f"{package}.hf:ArcticFor{task}"
                    for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")
                },
            ),
        )

    @property
    def trainer_mixins(self) -> tuple[str, ...]:
        return ("arctic_plugins_moe.training:LogsRouters",) if self.options.log else ()

    @hookimpl
    def validate(self, model_config: Any) -> Iterable[str]:
        self.check_processes("expert_parallel")
        if self.options.min_capacity and self.options.capacity_factor is None:
            raise ConfigError(
                "plugins.moe.min_capacity is set, but capacity_factor is not",
                fix="set capacity_factor, or leave min_capacity out",
            )
        if self.options.router_z_loss_coef is not None and not hasattr(model_config, "router_z_loss_coef"):
            raise ConfigError(
                f"plugins.moe.router_z_loss_coef is set, but {model_config.model_type} has no z-loss",
                fix="leave it out",
            )
        if self.options.router_aux_loss_coef is not None and not hasattr(model_config, "router_aux_loss_coef"):
            raise ConfigError(
                f"plugins.moe.router_aux_loss_coef is set, but {model_config.model_type} has no load balancing loss",
                fix="leave it out",
            )
        return []

    @hookimpl
    def hf_configure_model(self, config: Any) -> None:
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if (value := getattr(self.options, name)) is not None and hasattr(config, name):
                setattr(config, name, value)
                config.output_router_logits = True

    @hookimpl
    def claim(self, modules: Mapping[str, LinearSpec]) -> Iterable[Claim]:
        if self.options.expert_parallel == 1 and self.options.capacity_factor is None:
            return []
        from arctic_plugins_moe.dispatch import ExpertParallel

        experts = [name for name, spec in modules.items() if spec.experts is not None]
        if not experts:
            raise ClaimError(
                "plugins.moe: this model has no experts that can be dispatched",
                expected="a mixture of experts",
                fix="leave 'moe' out",
            )
        dispatch = ExpertParallel(self.options)
        return [Claim("experts_dispatch", name, dispatch) for name in experts]
