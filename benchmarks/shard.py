"""LoRA over a base of which every process holds all or a part: bytes in each process, and step time.

    python benchmarks/shard.py [--processes 2] [--tokens 512] [--steps 5]

The model is a random Llama of 0.5B parameters, trained in bfloat16 with LoRA (r=16) and gradient checkpointing on one
row of random tokens in each of several processes on this machine (gloo). The stacks take turns; "s/step" is the median.
"gather" is the speed at which gloo gathers a weight of the model's largest size, in bytes received.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STACKS = {
    "bf16": {},
    "fp8": {"fp8": {}},
    "bf16, shard": {"shard": {}},
    "fp8, shard": {"fp8": {}, "shard": {}},
    "fp8, shard, half on disk": {"fp8": {}, "shard": {}, "offload": {"to": "disk", "ratio": 0.5}},
}


def train(checkpoint: str, tokens: int, steps: int) -> None:
    """In each process."""
    import torch
    import torch.distributed as dist
    from arctic_plugins_huggingface import load_model

    from arctic_plugins import Stack
    from arctic_plugins.frozen import FrozenModule

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    models, times, held = {}, {name: [] for name in STACKS}, {}
    for name, plugins in STACKS.items():
        torch.manual_seed(0)
        model, _ = load_model(checkpoint, Stack.from_dict({**plugins, "lora": {"r": 16}}), dtype=torch.bfloat16)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        models[name] = model
        linear = [module for path, module in model.named_modules() if path.endswith(("_proj", "base_layer"))]
        held[name] = sum(parameter.nbytes for module in linear for parameter in module.parameters(recurse=False))
        handles = [
            weight.handle
            for module in model.modules()
            if isinstance(module, FrozenModule)
            for weight in module.frozen.values()
            if weight.handle
        ]
        held[name] += sum(
            handle.kept.nbytes for handle in handles if isinstance(getattr(handle, "kept", None), torch.Tensor)
        )
    ids = torch.randint(10, 31000, (1, tokens))
    for step in range(steps + 1):
        for name, model in models.items():
            dist.barrier()
            started = time.perf_counter()
            model(ids, labels=ids, use_cache=False).loss.backward()
            if step:
                times[name].append(time.perf_counter() - started)
    largest = 1536 * 6144
    part, whole = (
        torch.zeros(largest // dist.get_world_size(), dtype=torch.uint8),
        torch.zeros(largest, dtype=torch.uint8),
    )
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    for _ in range(3):
        gather(whole, part)
    started = time.perf_counter()
    for _ in range(20):
        gather(whole, part)
    speed = largest * 20 / (time.perf_counter() - started)
    if rank == 0:
        medians = {name: statistics.median(found) for name, found in times.items()}
        print(json.dumps({"held": held, "step": medians, "gather": speed}))


def main() -> None:
    """Parse the command line, make the model, start the processes."""
    if sys.argv[1:2] == ["child"]:
        train(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    from arctic_plugins.testing import tiny_llama

    sizes = {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_llama(Path(folder) / "model", dtype="bfloat16", head_dim=128, vocab_size=32000, **sizes)
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(arguments.processes),
            __file__,
        ]
        threads = str(max(1, (os.cpu_count() or 1) // arguments.processes))
        command = [*launcher, "child", str(checkpoint), str(arguments.tokens), str(arguments.steps)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": threads}
        )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    print(f"{arguments.processes} processes, gather {found['gather'] / 1e9:.2f} GB/s\n")
    print("| base | linear MB in each process | s/step | of bf16 |\n|---|---|---|---|")
    for name, step in found["step"].items():
        print(f"| {name} | {found['held'][name] / 1e6:.0f} | {step:.2f} | {step / found['step']['bf16']:.2f} |")


if __name__ == "__main__":
    main()
