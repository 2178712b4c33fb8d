"""The laws of plugins, and of the loss of this one."""

from arctic_plugins.testing import LLAMA_LIKE, MIXTURES, LossSuite, PluginSuite

ARCTIC = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layer_frequency": 1, "parallel_attn_mlp_res": True}


class TestPlugin(PluginSuite):
    plugin = "longseq"
    options = [{}, {"loss_tile": 7, "tiled_mlp": True, "mlp_tile": 13, "recompute": 0.5}]


class TestLoss(LossSuite):
    plugin = "longseq"
    options = [{}, {"loss_tile": 1}, {"loss_tile": 7}]
    models = [
        *LossSuite.models,
        LLAMA_LIKE["phi"],
        LLAMA_LIKE["gemma"],
        (MIXTURES["mixtral"][0], {**MIXTURES["mixtral"][1], "output_router_logits": True}),
        ("arctic", {**ARCTIC, "output_router_logits": True}),
    ]
