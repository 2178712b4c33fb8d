"""The plugin ``acme-0-1-model``: a model architecture for both hosts."""

from __future__ import annotations

from arctic_plugins import ModelClasses, Plugin, Registry, hookimpl

__all__ = ["Acme01Model"]


class Acme01Model(Plugin):
    """The model type ``acme-0-1-model``, in transformers and vLLM.

    Checkpoints of this type load wherever this package is installed. A recipe need not enable it.
    """

    name = "acme-0-1-model"
    contracts = frozenset({1})

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        registry.model(
            "acme-0-1-model",
            ModelClasses(
                config="arctic_acme_0_1_model.configuration:Acme01ModelConfig",
                base="arctic_acme_0_1_model.hf:Acme01ModelModel",
                causal_lm="arctic_acme_0_1_model.hf:Acme01ModelForCausalLM",
                vllm="arctic_acme_0_1_model.vllm:Acme01ModelForCausalLM",
            ),
        )
