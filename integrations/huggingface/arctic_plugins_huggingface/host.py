"""Description of transformers for the core. Importing this module loads neither torch nor transformers.

Read in transformers 5.19.0.
"""

from __future__ import annotations

from arctic_plugins.host import Host

__all__ = ["HOST"]

HOST = Host(
    name="transformers",
    distributions=("transformers",),
    integration="arctic-plugins-huggingface",
    register="arctic_plugins_huggingface:register",
    recorded=("arctic-plugins-huggingface", "torch", "transformers", "peft"),
    # Models trained here are served by vLLM, where nothing can be changed any more. The table is that of
    # arctic-plugins-vllm, which need not be installed.
    fused_siblings={"vLLM": (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))},
    # With the first key, weights are read from another file, even a pickle; with the second, vLLM serves another model.
    refused_keys=frozenset({"transformers_weights", "speculators_config"}),
    hub_code_keys=frozenset(
        {
            "attn_implementation",
            "attn_implementation_internal",
            "experts_implementation",
            "experts_implementation_internal",
        }
    ),
    services={
        "configured": "arctic_plugins_huggingface.loading.plan:configured",
        "load_config": "arctic_plugins_huggingface.loading.config:load_config",
        "planned_config": "arctic_plugins_huggingface.loading.plan:planned_config",
    },
)
