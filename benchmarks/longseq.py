"""Training SmolLM2-135M with LoRA on increasingly long sequences: peak memory and step time, compared with plain PEFT.

    python benchmarks/longseq.py [--shapes 4x256 1x1024 1x2048 ...] [--limit-mb 8000] [--steps 3] [--json FILE]

The contenders are with and without `longseq`. Each contender and shape has its own process, and they take turns. Random
tokens, bfloat16 weights, autocast, r = 16 on all linear layers, AdamW. "Peak" is the largest resident size of the whole
process (VmHWM, which includes about half a gigabyte of libraries), "step" the median of the steps after the first. A
contender whose peak at one length exceeds the limit is not run at longer ones. The model is the demo's. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LORA: dict[str, Any] = {"lora": {"r": 16}}
CONTENDERS: dict[str, tuple[dict[str, Any], bool]] = {
    "PEFT": (LORA, False),
    "tiled loss": ({**LORA, "longseq": {}}, False),
    "tiled loss, MLP": ({**LORA, "longseq": {"tiled_mlp": True}}, False),
    "tiled loss, 65 % recomputed": ({**LORA, "longseq": {"recompute": 0.65}}, False),
    "PEFT, checkpoints": (LORA, True),
    "tiled loss, all recomputed": ({**LORA, "longseq": {"recompute": 1}}, False),
    "tiled loss, MLP, all recomputed": ({**LORA, "longseq": {"tiled_mlp": True, "recompute": 1}}, False),
}
"""Name -> (plugins, gradient checkpointing of whole layers)."""


def measure(plugins: dict[str, Any], checkpoints: bool, rows: int, length: int, steps: int) -> dict[str, float]:
    """Train in this process."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `arctic train` does
    import torch
    from arctic_plugins_demo.model import smollm2
    from arctic_plugins_huggingface import load_model

    from arctic_plugins import Stack

    torch.manual_seed(0)
    model, _ = load_model(str(smollm2()), Stack.from_dict(plugins), dtype=torch.bfloat16)
    model.train()
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    ids = torch.randint(0, 49152, (rows, length))
    seconds, losses = [], []
    for _ in range(steps):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss
        seconds.append(time.perf_counter() - started)
    peak = next(
        int(line.split()[1]) / 1e3
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return {"peak": peak, "step": statistics.median(seconds[1:] or seconds), "loss": losses[0]}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4x256", "1x1024", "1x2048", "1x4096", "1x8192", "1x16384"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--limit-mb", type=float, default=8000)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\nRESULT " + json.dumps(measure(**json.loads(options.child))))
        return
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in options.contenders}
    print(
        "| rows x length | contender | peak MB | of PEFT's | step s | of PEFT's | loss |\n|---|---|---|---|---|---|---|"
    )
    for shape in options.shapes:
        rows, length = map(int, shape.split("x"))
        for name in options.contenders:
            if any(result["peak"] > options.limit_mb for result in found[name].values()):
                continue
            plugins, checkpoints = CONTENDERS[name]
            steps = options.steps if rows * length <= 4096 else 2 if rows * length <= 8192 else 1
            job = {"plugins": plugins, "checkpoints": checkpoints, "rows": rows, "length": length, "steps": steps}
            command = [sys.executable, __file__, "--child", json.dumps(job)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(
                next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT ")
            )
            found[name][shape] = result
            plain = found.get("PEFT", {}).get(shape)
            ratios = [f"{result[key] / plain[key]:.2f}" if plain else "" for key in ("peak", "step")]
            print(
                f"| {shape} | {name} | {result['peak']:.0f} | {ratios[0]} | {result['step']:.2f} | {ratios[1]} | "
                f"{result['loss']:.4f} |",
                flush=True,
            )
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
