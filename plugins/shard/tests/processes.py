"""Run by ``torchrun``: ``processes.py TASK CHECKPOINT [...]``."""

import importlib
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from arctic_plugins_huggingface import load_model, save_checkpoint
from arctic_plugins_shard.config import ShardConfig
from arctic_plugins_shard.placement import ShardPlacement

from arctic_plugins import Stack
from arctic_plugins.frozen import FrozenModule
from arctic_plugins.testing import PlacementSuite, TracedGpu, say

IDS = torch.arange(10, 42)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def load(checkpoint, plugins):
    return load_model(checkpoint, Stack.from_dict(plugins))


def frozen(model):
    return [
        weight for module in model.modules() if isinstance(module, FrozenModule) for weight in module.frozen.values()
    ]


class Laws(PlacementSuite):
    def make(self, directory):
        return ShardPlacement(ShardConfig(timeout=60))


def laws(directory):
    Laws().check(tmp_path=Path(directory))
    dist.barrier()  # the last law makes groups, for which the others must not be gone
    say({"checked": True})


def compare_logits(checkpoint):
    fp8 = ({"fp8": options} for options in ({}, {"bits": 6, "group_size": 32}, {"bits": 12}))
    bnb = ({"bnb": options} for options in ({"double_quant": True}, {"type": "int8"}))
    for base in (*fp8, *bnb, {}):
        whole, _ = load(checkpoint, base)
        model, _ = load(checkpoint, {**base, "shard": {}})
        equal = all(torch.equal(logits(model), logits(whole)) for _ in range(3))
        kept = [weight.handle.kept.nbytes for weight in frozen(model)]
        sizes = [weight.codec.nbytes(weight.shape) for weight in frozen(model)]
        buffers = sum(len(weight.codec.layout(weight.shape)) for weight in frozen(model))
        say({"equal": equal, "kept": sum(kept), "whole": sum(sizes), "weights": buffers})
        del model
    model, _ = load(checkpoint, {"fp8": {}, "shard": {}, "offload": {"to": "disk", "ratio": 0.5}})
    whole, _ = load(checkpoint, {"fp8": {}})
    equal = all(torch.equal(logits(model), logits(whole)) for _ in range(3))
    kept = [weight.handle.kept.nbytes for weight in frozen(model) if isinstance(weight.handle.kept, torch.Tensor)]
    sizes = [weight.codec.nbytes(weight.shape) for weight in frozen(model)]
    say({"equal": equal, "kept": 2 * sum(kept) * 0.95, "whole": sum(sizes), "weights": 2 * len(sizes)})


def skip(checkpoint, prefetch):
    skip_in(load(checkpoint, {"fp8": {}, "shard": {"timeout": 60, "prefetch": int(prefetch)}})[0])


def skip_in(model):
    for _ in range(3):
        logits(model)
    if dist.get_rank() == 1:
        layer = model.model.layers[0].mlp.gate_proj
        layer.forward = lambda x: x.new_zeros(*x.shape[:-1], layer.out_features)
    logits(model)


def absent(checkpoint):
    model, _ = load(checkpoint, {"fp8": {}, "shard": {"timeout": 3}})
    if dist.get_rank() == 0:
        try:
            logits(model)
        except Exception as error:
            print(error, flush=True)
    else:
        time.sleep(8)


def on_traced_gpu(checkpoint, base, prefetch):
    """Load with the way that GPUs take, whose streams are traced; NCCL's collectives are gloo's."""
    gpu = TracedGpu()
    for plugin in ("shard.placement", "offload.host"):
        importlib.import_module(f"arctic_plugins_{plugin}").Gpu = lambda: gpu
    model, _ = load(checkpoint, {**base, "shard": {"timeout": 60, "prefetch": int(prefetch)}})
    return model, gpu


def traced(checkpoint):
    for base in ({"fp8": {}}, {"fp8": {}, "offload": {"ratio": 0.5, "prefetch": 1}}):
        whole, _ = load(checkpoint, {"fp8": {}})
        for prefetch in (0, 2):
            model, gpu = on_traced_gpu(checkpoint, base, prefetch)
            equal, live = True, set()
            for _ in range(4):
                equal &= torch.equal(logits(model), logits(whole))
                live.add(gpu.live)
            placement = next(weight.handle.placement for weight in frozen(model))
            [staging] = placement._staging.values()
            largest = max(placement._sizes.values())
            bounded = len(live) == 1 and len(staging.ring) <= (prefetch + 1) * (largest + 256)
            say({"equal": equal, "errors": gpu.errors, "bounded": bounded})


def skip_traced(checkpoint, prefetch):
    skip_in(on_traced_gpu(checkpoint, {"fp8": {}}, prefetch)[0])


def save(checkpoint, directory):
    stack = Stack.from_dict({"fp8": {}, "shard": {}})
    model, tokenizer = load_model(checkpoint, stack)
    save_checkpoint(model, tokenizer, directory, stack)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    task, *arguments = sys.argv[1:]
    tasks = {"laws": laws, "logits": compare_logits, "skip": skip, "absent": absent, "save": save}
    {**tasks, "traced": traced, "skip_traced": skip_traced}[task](*arguments)
