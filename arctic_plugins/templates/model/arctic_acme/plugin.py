"""The plugin ``acme``: a model architecture for both hosts."""

from __future__ import annotations

from arctic_plugins import ModelClasses, Plugin, Registry, hookimpl

__all__ = ["Acme"]


class Acme(Plugin):
    """The model type ``acme``, in transformers and vLLM.

    Checkpoints of this type load wherever this package is installed. A recipe need not enable it.
    """

    name = "acme"
    contracts = frozenset({1})

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        registry.model(
            "acme",
            ModelClasses(
                config="arctic_acme.configuration:AcmeConfig",
                base="arctic_acme.hf:AcmeModel",
                causal_lm="arctic_acme.hf:AcmeForCausalLM",
                vllm="arctic_acme.vllm:AcmeForCausalLM",
            ),
        )
