"""LoRA over a base that is partly on disk: memory and step time by ratio, and a limit that only offload survives.

    python benchmarks/offload.py ratios [--tokens 512] [--steps 6] [--rounds 3]
    python benchmarks/offload.py limit [--limit-mb 2000] [--tokens 128]

The model is a random Llama of 1.1B parameters (TinyLlama's shapes), trained in bfloat16 with LoRA (r=16) and gradient
checkpointing on one row of random tokens. ratios: one process per ratio, and the processes take turns. "resident" is
the part of the encoded weights that is in memory between two steps, counted by page (/proc/self/pagemap), "highest" its
largest sampled value during a step, and "s/step" the median over all rounds. limit: several stacks, one after the
other, under RLIMIT_DATA, which limits what a process may allocate (files mapped read-only do not count). Linux only.
"""

from __future__ import annotations

import argparse
import json
import mmap
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def make_model(folder: Path) -> Path:
    """The random model, written once."""
    from arctic_plugins.testing import tiny_llama

    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }
    return tiny_llama(folder / "model", dtype="bfloat16", head_dim=64, vocab_size=32000, **sizes)


def present(ranges: list[tuple[int, int]]) -> int:
    """Bytes of (address, length) that are in this process's memory (Documentation/admin-guide/mm/pagemap.rst: bit
    63).
    """
    pages = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        for address, length in ranges:
            first, last = address // mmap.PAGESIZE, (address + length - 1) // mmap.PAGESIZE
            file.seek(8 * first)
            pages += sum(byte >> 7 for byte in file.read(8 * (last - first + 1))[7::8])
    return pages * mmap.PAGESIZE


def rss() -> int:
    """Resident bytes of this process."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Rss:"))


def measure(checkpoint: str, plugins: dict[str, Any], tokens: int, steps: int) -> dict[str, Any]:
    """Load and train; sizes in MB, times in seconds."""
    import torch
    from arctic_plugins_huggingface import load_model

    from arctic_plugins import Stack
    from arctic_plugins.frozen import FrozenModule

    torch.manual_seed(0)
    started = time.perf_counter()
    model, _ = load_model(checkpoint, Stack.from_dict({**plugins, "lora": {"r": 16}}), dtype=torch.bfloat16)
    loading = time.perf_counter() - started
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    ids = torch.randint(10, 31000, (1, tokens))
    frozen = [
        (module, leaf) for module in model.modules() if isinstance(module, FrozenModule) for leaf in module.frozen
    ]
    ranges = [(buffer.data_ptr(), buffer.nbytes) for module, leaf in frozen for buffer in module.export(leaf).values()]
    highest, done = 0, threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(0.25):
            highest = max(highest, present(ranges))

    times, losses = [], []
    for step in range(steps + 2):
        if step == steps + 1:  # the last one is watched, not timed
            threading.Thread(target=sample, daemon=True).start()
        started = time.perf_counter()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - started)
    done.set()
    sizes = {
        "encoded": sum(length for _, length in ranges),
        "resident": present(ranges),
        "highest": highest,
        "rss": rss(),
    }
    return {
        "seconds": times[1:-1],
        "loss": losses[-1],
        "loading": loading,
        **{key: size / 1e6 for key, size in sizes.items()},
    }


def child(
    checkpoint: Path, plugins: dict[str, Any], arguments: argparse.Namespace, limit: int | None = None
) -> subprocess.CompletedProcess[str]:
    """:func:`measure` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "child",
        str(checkpoint),
        json.dumps(plugins),
        str(arguments.tokens),
        str(arguments.steps),
    ]

    def bound() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=bound)


def run_ratios(arguments: argparse.Namespace, folder: Path) -> None:
    """The table by ratio."""
    checkpoint = make_model(folder)
    runs: dict[float, list[dict[str, Any]]] = {ratio: [] for ratio in RATIOS}
    for _ in range(arguments.rounds):
        for ratio in RATIOS:
            offload = {"to": "disk", "ratio": ratio, "path": str(folder / "files")}
            done = child(checkpoint, {"fp8": {}, "offload": offload}, arguments)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            runs[ratio].append(json.loads(done.stdout.splitlines()[-1]))
    print(
        "| ratio | promised MB | resident MB | highest MB | process MB | s/step | of ratio 0 | loss "
        "|\n|---|---|---|---|---|---|---|---|"
    )
    base = statistics.median(time for run in runs[0.0] for time in run["seconds"])
    for ratio, found in runs.items():
        step = statistics.median(time for run in found for time in run["seconds"])
        last = found[-1]
        sizes = " | ".join(f"{last[key]:.0f}" for key in ("resident", "highest", "rss"))
        print(
            f"| {ratio} | {last['encoded'] * (1 - ratio):.0f} | {sizes} | {step:.2f} | {step / base:.2f} | "
            f"{last['loss']:.6f} |"
        )


def run_limit(arguments: argparse.Namespace, folder: Path) -> None:
    """Which stacks finish under the limit."""
    from arctic_plugins_huggingface import load_model, save_checkpoint

    from arctic_plugins import Stack

    plain, encoded, offload = make_model(folder), folder / "encoded", {"to": "disk", "path": str(folder / "files")}
    save_checkpoint(*load_model(plain, stack := Stack.from_dict({"fp8": {}})), encoded, stack)
    print(f"RLIMIT_DATA {arguments.limit_mb} MB, {arguments.tokens} tokens\n\n| base | outcome |\n|---|---|")
    for label, checkpoint, plugins in (
        ("bf16", plain, {}),
        ("bf16, offload to disk", plain, {"offload": offload}),
        ("fp8", encoded, {}),
        ("fp8, offload to disk", encoded, {"offload": offload}),
    ):
        done = child(checkpoint, plugins, arguments, arguments.limit_mb * 10**6)
        if done.returncode:
            last = next(
                (line for line in reversed(done.stderr.splitlines()) if "emory" in line),
                f"exit status {done.returncode}",
            )
            print(f"| {label} | fails: {last[:150]} |")
        else:
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {label} | trains: loss {found['loss']:.4f}, {statistics.median(found['seconds']):.2f} s/step, "
                f"{found['rss']:.0f} MB resident |"
            )


def main() -> None:
    """Parse the command line."""
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(measure(sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ratios", "limit"))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-mb", type=int, default=2000)
    parser.add_argument(
        "--folder", type=Path, help="directory for the model and the offloaded weights; default: a temporary directory"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        (run_ratios if arguments.what == "ratios" else run_limit)(arguments, Path(folder))


if __name__ == "__main__":
    main()
