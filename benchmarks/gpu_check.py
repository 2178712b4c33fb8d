"""Check what runs on this GPU, and how fast: tests marked ``gpu``, the dtype policy, an fp8 layer and a LoRA run.

    python benchmarks/gpu_check.py [--json result.json] [--layers 16] [--device cpu]

The layer and the run are compared with bfloat16. The packages of this checkout do not have to be installed: they are
found through their metadata, which is written to a temporary directory. Figures are medians of 20 calls after 5
warm-up calls, by CUDA events; whether a layer's weights are in the card's cache depends on their size. The run trains a
random Llama of ``--layers`` layers (about a billion parameters with 16) on random texts, and reports seconds per step
and the peak of allocated memory. ``--device cpu`` is for testing the script itself.
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
import tomllib
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = (
    "plugins/fp8/tests/test_kernels.py",
    "plugins/fp8/tests/test_triton.py",
    "plugins/longseq/tests/test_longseq.py",
    "plugins/offload/tests/test_offload.py",
    "tests/test_waiting.py",
)
ROWS = (1, 8, 64, 512, 4096)
CODECS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "fp8 g128": {"group_size": 128},
    "fp6": {"bits": 6, "group_size": 128},
    "fp12": {"bits": 12},
}


def expose(site: Path) -> None:
    """Make this checkout's packages importable, and their entry points visible, here and in child processes."""
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["arctic-plugins"]["distributions"]
    parts = [ROOT, *sorted(path.parent for folder in workspace for path in ROOT.glob(f"{folder}/pyproject.toml"))]
    for part in parts:
        project = tomllib.loads((part / "pyproject.toml").read_text())["project"]
        metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        groups = project.get("entry-points", {}).items()
        lines = [
            f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in points.items())
            for group, points in groups
        ]
        (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    paths = [str(site), *map(str, parts)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])


def tests() -> dict[str, Any]:
    """The tests that no machine without a GPU can run."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)
    print(done.stdout[-3000:], done.stderr[-2000:], flush=True)
    return {"status": done.returncode, "summary": (done.stdout.strip().splitlines() or [""])[-1]}


def milliseconds(call: Any, device: str) -> float:
    """The median of 20 calls after 5."""
    import torch

    times = []
    for _ in range(25):
        if device == "cpu":
            since = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - since))
            continue
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[5:])


def layer(size: tuple[int, int], device: str) -> dict[str, Any]:
    """Milliseconds of one linear layer by rows of x: forward, and forward with the gradient of x; the error against the
    decoded weight in float32.
    """
    import torch
    from arctic_plugins_fp8.codec import FP8Codec

    from arctic_plugins.frozen import FrozenLinear

    plain = torch.nn.Linear(size[1], size[0], bias=False, dtype=torch.bfloat16, device=device)
    weight = plain.weight.data
    modules: dict[str, torch.nn.Module] = {"bf16": plain}
    found: dict[str, Any] = {}
    for name, options in CODECS.items():
        module = FrozenLinear.from_linear(
            torch.nn.Linear(size[1], size[0], bias=False, device="meta", dtype=torch.bfloat16), FP8Codec(**options)
        )
        module.encode(weight.cpu())
        modules[name] = module = module.to(device)
        x = torch.randn(64, size[1], device=device, dtype=torch.bfloat16, requires_grad=True)
        exact = x.detach().float() @ module.decode(torch.float32).T
        y = module(x)
        y.sum().backward()
        gradient = torch.ones(64, size[0], device=device) @ module.decode(torch.float32)
        error = max(((y - exact).norm() / exact.norm()).item(), ((x.grad - gradient).norm() / gradient.norm()).item())
        assert error < 6e-3, f"{name}: {error}"
        found[f"{name} error"] = error
    for name, module in modules.items():
        for rows in ROWS:
            x = torch.randn(rows, size[1], device=device, dtype=torch.bfloat16, requires_grad=True)
            y = torch.randn(rows, size[0], device=device, dtype=torch.bfloat16)
            with torch.no_grad():
                forward = milliseconds(lambda module=module, x=x: module(x), device)
            both = milliseconds(lambda module=module, x=x, y=y: torch.autograd.grad(module(x), x, y), device)
            found[f"{name} {rows}"] = [round(forward, 4), round(both, 4)]
    return found


def run(layers: int, directory: Path, device: str) -> dict[str, Any]:
    """Seconds a step of LoRA, the peak of memory and the last loss, over bfloat16 and over fp8."""
    import torch
    from arctic_plugins_huggingface import load_model
    from arctic_plugins_huggingface.training.trainer import attach
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from arctic_plugins import Stack
    from arctic_plugins.compute import compute_dtype
    from arctic_plugins.testing import tiny_llama

    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": layers,
    }
    checkpoint = tiny_llama(directory / "llama", dtype="bfloat16", max_position_embeddings=2048, **sizes)
    texts = [{"input_ids": (ids := torch.randint(5, 250, (1024,))), "labels": ids} for _ in range(4 * 14)]

    class Steps(TrainerCallback):
        def __init__(self) -> None:
            self.begun: list[float] = []

        def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.begun.append(time.perf_counter())

    found = {}
    for name, plugins in {"bf16": {"lora": {"r": 16}}, "fp8": {"fp8": {}, "lora": {"r": 16}}}.items():
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        stack, steps = Stack.from_dict(plugins), Steps()
        model, _ = load_model(checkpoint, stack)
        assert model.dtype == compute_dtype(torch.bfloat16, device), model.dtype
        arguments = TrainingArguments(
            str(directory / name),
            max_steps=14,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_steps=14,
            disable_tqdm=True,
            seed=1,
        )
        trainer = Trainer(model, arguments, train_dataset=texts, callbacks=[steps])
        attach(trainer, stack)
        loss = trainer.train().training_loss
        pauses = [after - before for before, after in zip(steps.begun[3:], steps.begun[4:], strict=False)]
        peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0
        found[name] = {"seconds": round(statistics.median(pauses), 4), "peak_mb": round(peak), "loss": round(loss, 4)}
        print(name, found[name], flush=True)
        del trainer, model
    return found


def main() -> None:
    """Every step's result, or what it failed with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        site = Path(directory) / "site"
        site.mkdir()
        expose(site)
        import torch

        from arctic_plugins.compute import compute_dtype

        result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "torch": torch.__version__,
        }
        result["dtypes"] = {
            str(dtype): str(compute_dtype(dtype, options.device)) for dtype in (torch.bfloat16, torch.float16)
        }
        steps = {
            "tests": tests,
            "layer": lambda: layer((4096, 4096), options.device),
            "run": lambda: run(options.layers, Path(directory), options.device),
        }
        for name, step in steps.items():
            try:
                result[name] = step()
            except Exception as error:  # the other figures are worth having
                result[name] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
            print(json.dumps({name: result[name]}), flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
