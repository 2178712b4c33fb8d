"""Run by ``torchrun``: ``moe_run.py CHECKPOINT OUT`` saves Arctic's weights as DeepSpeed does, with its own MoE
layers.
"""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from safetensors.torch import load_file
from torch import nn

EXPERTS, HIDDEN, INNER = 4, 64, 48


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER, bias=False)
        self.w2 = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """``block_sparse_moe``, and beside it all else under its own name."""

    def __init__(self):
        super().__init__()
        self.mlp = MoE(HIDDEN, Expert(), num_experts=EXPERTS, ep_size=2, k=2, capacity_factor=4.0, min_capacity=0)


def tree(names):
    """Modules with parameters of these names and shapes."""
    root = nn.Module()
    for name, tensor in names.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, nn.Parameter(tensor.clone()))
    return root


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo")
    weights = load_file(os.path.join(sys.argv[1], "model.safetensors"))
    model = tree({name: tensor for name, tensor in weights.items() if "block_sparse_moe" not in name})
    for layer in range(3):
        getattr(model.model.layers, str(layer)).block_sparse_moe = Block()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(
            split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"}),
            lr=1e-3,
        ),
        config={"train_micro_batch_size_per_gpu": 1},
    )
    rank = dist.get_rank()
    with torch.no_grad():
        for layer in range(3):
            prefix, block = (
                f"model.layers.{layer}.block_sparse_moe",
                getattr(model.model.layers, str(layer)).block_sparse_moe,
            )
            block.mlp.deepspeed_moe.gate.wg.weight.copy_(weights[f"{prefix}.gate.weight"])
            for local, expert in enumerate(block.mlp.deepspeed_moe.experts.deepspeed_experts):
                for i in (1, 2, 3):
                    getattr(expert, f"w{i}").weight.copy_(
                        weights[f"{prefix}.experts.{rank * EXPERTS // 2 + local}.w{i}.weight"]
                    )
    engine.save_checkpoint(sys.argv[2], tag="step")
    dist.barrier()
