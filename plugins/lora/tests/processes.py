"""Run by ``torchrun``: ``processes.py CHECKPOINT ADAPTER PLUGINS``; what is compared is written as JSON, one line."""

import json
import sys

import torch
import torch.distributed as dist
from arctic_plugins_huggingface import load_model, register
from arctic_plugins_huggingface.adapters.lora import expert_pairs, load_adapter

from arctic_plugins import Stack
from arctic_plugins.frozen import local_parameters


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp_min(1e-9)).item()


def compare(checkpoint, adapter, plugins):
    """An adapter on this process's experts against the same on a model that is whole."""
    models = []
    for moe in ({}, {"moe": {"expert_parallel": dist.get_world_size()}}):
        model, _ = load_model(checkpoint, Stack.from_dict({**plugins, **moe}))
        models.append(load_adapter(model, adapter, trainable=True).train())
    whole, model = models
    ids = torch.randint(5, 272, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    outputs = [one(ids, labels=ids) for one in models]
    for output in outputs:
        output.loss.backward()
    found = {"logits": relative(*(output.logits for output in reversed(outputs))), "gradients": 0.0, "pairs": 0}
    expected, layouts, local = dict(whole.named_parameters()), expert_pairs(model), local_parameters(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = expected[name].grad
            dist.all_reduce(grad)  # other processes have other tokens
            if name in local:
                layout = layouts[name]
                parts = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, parameter.grad)
                found["pairs"] += 1
                found["gradients"] = max(found["gradients"], relative(layout.join(parts), grad))
                part = local[name][1].local(layout.split(grad).shape[0])
                found["gradients"] = max(found["gradients"], relative(parameter.grad, layout.part(grad, part)))
            else:
                dist.all_reduce(parameter.grad)
                found["gradients"] = max(found["gradients"], relative(parameter.grad, grad))
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    register()
    dist.init_process_group("gloo")
    compare(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
