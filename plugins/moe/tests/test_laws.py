"""The laws of plugins, and of the architecture and the dispatch of this one."""

from arctic_plugins_moe.config import MoEConfig
from arctic_plugins_moe.dispatch import ExpertParallel

from arctic_plugins.testing import MIXTURES, DispatchSuite, ModelSuite, PluginSuite


class TestPlugin(PluginSuite):
    plugin = "moe"
    model = MIXTURES["mixtral"]
    options = [{}, {"capacity_factor": 4.0, "router_aux_loss_coef": 0.01}]


class TestArctic(ModelSuite):
    model_type = "arctic"
    config = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_layer_frequency": 1,
        "parallel_attn_mlp_res": True,
    }


class TestDispatch(DispatchSuite):
    """In one process; ``test_expert_parallel.py`` has several."""

    dispatches = [ExpertParallel(MoEConfig(overlap_degree=degree)) for degree in (1, 3)]
