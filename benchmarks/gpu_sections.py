"""What ``gpu.py`` measures, one function per section, each run as ``python benchmarks/gpu_sections.py SECTION``.

A figure is recorded as soon as it is known, so that what comes before a failure counts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gpu import MARK, ROOT, Figure

GIB = 2**30
LORA = {"lora": {"r": 16}}
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
}
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MIXTRAL = {
    **LLAMA_8B,
    "num_hidden_layers": 2,
    "vocab_size": 32_000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}


def size(nbytes: float) -> str:
    """Return bytes in words."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3f} MB"


class Bench:
    """What a section may use, and where its figures go.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        small: whether shapes are tiny, to test the script.
        memory: GiB of the card that may be used.
        until: when the section is ended, in seconds since the epoch.
        add: takes each figure.
    """

    def __init__(self, device: str, small: bool, memory: float, until: float, add: Callable[[Figure], None]) -> None:
        self.device, self.small, self.memory, self.until, self.add = device, small, memory, until, add

    def figure(self, name: str, text: str, met: bool | None = None, target: str = "", **data: Any) -> None:
        """Record a figure: ``text`` for the table, ``data`` for the JSON file; ``met`` if there is a target.

        Targets are for the full shapes.
        """
        self.add({"name": name, "text": text, "target": target, "met": None if self.small else met, **data})

    def skip(self, name: str, why: str) -> None:
        """Record that something was not measured."""
        self.figure(name, f"skipped: {why}", skipped=True)

    def enough(self, seconds: float, name: str) -> bool:
        """Return whether ``seconds`` are left for ``name``; record that it is skipped if not."""
        if (left := self.until - time.time()) >= seconds:
            return True
        self.skip(name, f"{left:.0f} s are left, and it takes about {seconds:.0f}")
        return False

    def sizes(self, full: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sizes of a model, or tiny ones with the same fields."""
        return {**full, **SMALL} if self.small else dict(full)

    def limit(self) -> int | None:
        """Limit torch's allocator to the memory of a card of ``memory`` GiB, and return the limit in bytes.

        The limit is lower by what such a card does not have for tensors: cards of 80 GB report 79.1 to 79.6 GiB, and
        CUDA's context and loaded kernels take about half a GiB of these.
        """
        if self.device == "cpu":
            return None
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        allowed = int(min(self.memory * GIB, total) - 1.5 * GIB)
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        return allowed


LATE = "no time is left for this test"


def tests(bench: Bench) -> None:
    """Run the tests that are marked ``gpu``, as pytest collects them from the whole repository.

    Files without such a test are not imported: many need libraries that are not needed here.
    """
    import pytest

    class Counts:
        def __init__(self) -> None:
            self.outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": [], "not run": []}

        def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
            if collection_path.suffix != ".py" or "mark.gpu" in collection_path.read_text(encoding="utf-8"):
                return None  # as configured
            return True

        def pytest_runtest_setup(self) -> None:
            if time.time() > bench.until - 10:
                pytest.skip(LATE)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                self.add(report)

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or not report.passed:
                self.add(report)

        def add(self, report: Any) -> None:
            late = report.skipped and LATE in str(report.longrepr)
            self.outcomes["not run" if late else report.outcome].append(report.nodeid)
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                lines = [crash.message] if crash else [report.longreprtext.strip()]
                bench.figure(report.nodeid, f"failed: {lines[0].splitlines()[0 if crash else -1]}", failed=True)

    counts = Counts()
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", str(ROOT)]
    status = pytest.main([*options, str(ROOT)], plugins=[counts])
    found = counts.outcomes
    text = ", ".join(f"{len(names)} {outcome}" for outcome, names in found.items() if names) or "none was found"
    met = bool(found["passed"]) and not found["failed"] and not found["not run"]
    bench.figure("tests marked gpu", text, met, "all pass", outcomes=found)
    if found["failed"] or status not in (0, 5):
        raise RuntimeError(f"{len(found['failed'])} tests failed (pytest's exit status {int(status)})")


SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 4, 16, 512, 4096)
CODECS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "fp6": {"bits": 6},
    "fp8 g128": {"group_size": 128},
    "fp12": {"bits": 12},
    "fp8, activations fp8": {"activations": "fp8"},
}


LEAST = {"fp8": (1.7, 0.85), "fp6": (2.2, 0.0)}
"""For one row of x: the least speed relative to bfloat16, and the least share of the read bandwidth."""


def kernels(bench: Bench) -> None:
    """Time forward products and gradients over weights that are not in the cache, and compare them with bfloat16's."""
    import torch
    from gpu_timing import read_bandwidth

    bench.limit()
    dtype = torch.bfloat16
    shapes, rows = (((96, 64), (112, 64)), (1, 16)) if bench.small else (SHAPES, ROWS)
    bandwidth = read_bandwidth(bench.device, 1 << 20 if bench.small else 1 << 31)
    bench.figure("read bandwidth", f"{bandwidth / 1e9:.0f} GB/s", bytes_per_second=bandwidth)
    plain = {shape: torch.randn(shape, dtype=dtype, device=bench.device).mul_(0.02) for shape in shapes}
    base: dict[Any, float] = {}
    wrong: list[str] = []
    for kind in ("bf16", *CODECS, *TORCH):
        for shape in shapes:
            name = f"{shape[0]} x {shape[1]} {kind}"
            if not bench.enough(8, name):
                continue
            try:
                wrong += _kernel(bench, name, kind, plain[shape], rows, bandwidth, base)
            except Exception as error:  # the others are worth having
                why = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                if kind in TORCH:
                    bench.skip(name, why)
                else:
                    bench.figure(name, f"failed: {why}", failed=True)
                    wrong.append(name)
    if wrong:
        raise RuntimeError(f"wrong or failed: {', '.join(wrong)}")


def _kernel(
    bench: Bench,
    name: str,
    kind: str,
    weight_NK: Any,
    rows: Sequence[int],
    bandwidth: float,
    base: dict[Any, float],
) -> list[str]:
    """Measure one kind of weight of one shape; return its name if its results are wrong.

    ``base`` holds bfloat16's seconds by shape, direction and rows.
    """
    import torch
    from gpu_timing import copies, seconds_each

    (n, k), runs, eager = weight_NK.shape, 3 if bench.small else 15, 0.0
    make = TORCH.get(kind) or (_plain if kind == "bf16" else partial(_encoded, codec=CODECS[kind]))
    first = make(weight_NK)
    weights = [first, *(first.copy() for _ in range(copies(first.nbytes, bench.device) - 1))]
    speeds: dict[str, dict[int, float]] = {}
    for way, width in {"forward": k, "gradient": n}.items():
        if getattr(first, way) is None:
            continue
        seconds: dict[int, float] = {}
        for m in rows:
            x = torch.randn(m, width, dtype=weight_NK.dtype, device=bench.device)
            calls = [weight.call(way, x) for weight in weights]
            seconds[m] = seconds_each(calls, bench.device, runs=runs)
            if m == 1 and way == "forward":
                eager = seconds_each(calls, bench.device, graph=False, runs=runs)
        if kind == "bf16":
            base |= {(n, k, way, m): found for m, found in seconds.items()}
        speeds[way] = {m: base[n, k, way, m] / found for m, found in seconds.items() if (n, k, way, m) in base}
        text = "  ".join(f"{m}: {1e6 * found:.1f} us ({speeds[way].get(m, 0):.2f}x)" for m, found in seconds.items())
        data: dict[str, Any] = {"seconds": seconds, "times_bf16": speeds[way], "weight_bytes": first.nbytes}
        if way == "forward":
            share = (first.nbytes + 2 * (n + k)) / seconds[1] / bandwidth
            text += f"; M = 1: {share:.0%} of the read bandwidth, {1e6 * eager:.1f} us without a graph"
            data |= {"eager_seconds": eager, "of_bandwidth": share}
        bench.figure(f"{name}, {way}", text, **data)
        if way == "forward" and kind in LEAST and speeds[way]:
            least, bound = LEAST[kind]
            text, target = f"{speeds[way][1]:.2f} times as fast as bf16, {share:.0%}", f"{least} times"
            met = speeds[way][1] >= least and share >= bound
            bench.figure(f"{name}, M = 1", text, met, f"{target}, {bound:.0%}" if bound else target)
    if kind not in CODECS:
        return []
    many = {way: [found[m] for m in rows[-2:] if m in found] for way, found in speeds.items()}
    slowest = {way: 1 / min(found) for way, found in many.items() if found}
    if slowest:
        text = ", ".join(f"{way} {ratio:.2f}" for way, ratio in slowest.items())
        bench.figure(
            f"{name}, M = {rows[-2]} and {rows[-1]}", f"{text} of bf16's time", max(slowest.values()) <= 1.05, "1.05"
        )
    return _check(bench, name, first, rows, kind)


def _check(bench: Bench, name: str, weight: Any, rows: Sequence[int], kind: str) -> list[str]:
    """Compare products with those of the decoded weight in float32, relative to their norm.

    Rounding the result to bfloat16 alone gives 2e-3, and rounding activations to e4m3 3e-2.
    """
    import torch

    n, k = weight.exact.shape
    errors = {}
    for m in rows:
        x, grad = (torch.randn(m, size, dtype=torch.bfloat16, device=bench.device) for size in (k, n))
        for way, given, exact in (
            ("forward", x, x.float() @ weight.exact.T),
            ("gradient", grad, grad.float() @ weight.exact),
        ):
            found = weight.call(way, given)().float()
            errors[f"{way} {m}"] = ((found - exact).norm() / exact.norm()).item()
    worst, bound = max(errors.values()), 5e-2 if "activations" in kind else 6e-3
    bench.figure(f"{name}, relative error", f"{worst:.1e}", worst <= bound, f"{bound:.0e}", errors=errors)
    return [] if worst <= bound else [name]


@dataclass(frozen=True)
class Weight:
    """A weight in some form, and its products."""

    tensors: dict[str, Any]
    forward: Callable[[Any, dict[str, Any]], Any]
    """``(x, tensors) -> x @ w.T``."""
    gradient: Callable[[Any, dict[str, Any]], Any] | None = None
    """``(grad, tensors) -> grad @ w``; None if it is not compared."""
    prepare: Callable[[Any], Any] = lambda x: x
    """What happens to x before the product, outside the time."""
    exact: Any = None
    """The weight in float32, if products are compared with it."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def copy(self) -> Weight:
        return replace(self, tensors={key: tensor.clone() for key, tensor in self.tensors.items()})

    def call(self, way: str, x: Any) -> Callable[[], Any]:
        """Return the call that is timed."""
        return partial(getattr(self, way), self.prepare(x), self.tensors)


def _plain(weight_NK: Any) -> Weight:
    return Weight({"": weight_NK}, lambda x, own: x @ own[""].T, lambda grad, own: grad @ own[""])


def _encoded(weight_NK: Any, codec: Mapping[str, Any]) -> Weight:
    import torch
    from arctic_plugins_fp8.codec import FP8Codec

    kind, shape = FP8Codec(**codec), tuple(weight_NK.shape)
    buffers = kind.encode(weight_NK)
    return Weight(
        buffers,
        lambda x, own: kind.linear(x, own, shape),
        lambda grad, own: kind.grad_input(grad, own, shape),
        exact=kind.decode(buffers, shape, torch.float32),
    )


def _scaled_mm(weight_NK: Any) -> Weight:
    """Return torch's product of e4m3 with e4m3, with a scale per row of each; x is encoded beforehand."""
    import torch

    def encode(x: Any) -> tuple[Any, Any]:
        scale = x.abs().amax(-1, keepdim=True).float() / 448
        return (x / scale).to(torch.float8_e4m3fn), scale

    def product(x: tuple[Any, Any], own: dict[str, Any]) -> Any:
        scales = {"scale_a": x[1], "scale_b": own["scale"].T}
        return torch._scaled_mm(x[0], own["codes"].T, **scales, out_dtype=weight_NK.dtype)

    codes, scale = encode(weight_NK)
    return Weight({"codes": codes, "scale": scale}, product, prepare=encode)


def _int4(weight_NK: Any) -> Weight:
    """Return torch's product over random 4-bit codes with a scale per 128 of a row."""
    import torch

    n, k = weight_NK.shape
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=weight_NK.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.randn(k // 128, n, 2, dtype=weight_NK.dtype, device=weight_NK.device)

    def product(x: Any, own: dict[str, Any]) -> Any:
        return torch.ops.aten._weight_int4pack_mm(x, own["codes"], 128, own["scales"])

    return Weight({"codes": packed, "scales": scales}, product)


TORCH: dict[str, Callable[..., Weight]] = {"torch._scaled_mm": _scaled_mm, "torch int4 g128": _int4}


def step(bench: Bench) -> None:
    """Train an 8B-shaped Llama with LoRA over bfloat16 and over fp8, and compare time and memory with the plan."""
    import torch
    from gpu_models import plan_random, release, train

    bench.limit()
    sizes, seconds = bench.sizes(LLAMA_8B), {}
    rows, tokens = (2, 16) if bench.small else (2, 1024)
    with tempfile.TemporaryDirectory() as folder:

        def measure(plugins: Mapping[str, Any], rows: int) -> Any:
            plan = plan_random(Path(folder) / "model", "llama", sizes, plugins, bench.device)
            return train(plan, plugins, rows, tokens, steps=1 if bench.small else 5)

        for name, codec in {"bf16": {}, "fp8": {"fp8": {}}}.items():
            try:
                found = measure({**codec, **LORA}, rows)
            except torch.OutOfMemoryError:
                if rows == 1 or name == "fp8":
                    raise
                rows = 1
                bench.skip(f"{name}, 2 x {tokens} tokens", "the device has too little memory; 1 row instead")
                release()
                found = measure({**codec, **LORA}, rows)
            seconds[name] = found.median
            _show(bench, f"{name}, {rows} x {tokens} tokens", found)
            _compare_plan(bench, name, found)
            release()
    ratio = seconds["fp8"] / seconds["bf16"]
    bench.figure("fp8: time to bf16's", f"{ratio:.3f}", ratio <= 1.05, "1.05", ratio=ratio)


def _show(bench: Bench, name: str, found: Any, note: str = "", **data: Any) -> None:
    peak = "" if found.peak is None else f", peak {size(found.peak)} ({size(found.reserved)} reserved)"
    bench.figure(
        name,
        f"{found.median:.3f} s a step{peak}, made in {found.loading:.1f} s{note}",
        step_seconds=found.seconds,
        peak_bytes=found.peak,
        reserved_bytes=found.reserved,
        loading_seconds=found.loading,
        loss=found.loss,
        **data,
    )


def _compare_plan(bench: Bench, name: str, found: Any) -> None:
    text = f"planned {size(found.planned)}"
    if found.held is None:
        bench.skip(f"{name}: memory as planned", f"not counted on a CPU; {text}")
        return
    off = found.held / found.planned - 1
    bench.figure(
        f"{name}: memory as planned",
        f"{text}, held {size(found.held)} ({off:+.1%})",
        abs(off) <= 0.05,
        "5 %",
        planned_bytes=found.planned,
        held_bytes=found.held,
    )


def offload(bench: Bench) -> None:
    """Train the 8B-shaped Llama over fp8 with none, half and all of its encoded weights in host memory."""
    from gpu_models import plan_random, release, train

    bench.limit()
    sizes, base = bench.sizes(LLAMA_8B), 0.0
    rows, tokens = (2, 16) if bench.small else (4, 1024)
    with tempfile.TemporaryDirectory() as folder:
        for ratio in (0.0, 0.5, 1.0):
            if not bench.enough(20, f"ratio {ratio}"):
                continue
            plugins: dict[str, Any] = {"fp8": {}, **LORA}
            plugins |= {"offload": {"to": "host", "ratio": ratio}} if ratio else {}
            plan = plan_random(Path(folder) / "model", "llama", sizes, plugins, bench.device)
            found = train(
                plan,
                plugins,
                rows,
                tokens,
                steps=1 if bench.small else 3,
                profile=bool(ratio),
                gradient_checkpointing=True,
            )
            del plan
            release()
            base = base or found.median
            name, to_base = f"ratio {ratio}, {rows} x {tokens} tokens", found.median / base
            _show(bench, name, found, f", {to_base:.3f} times ratio 0's time")
            if not ratio:
                continue
            if ratio == 0.5:
                bench.figure("ratio 0.5: time to ratio 0's", f"{to_base:.3f}", to_base <= 1.10, "1.10", ratio=to_base)
            if found.overlap is None:
                bench.skip(f"ratio {ratio}: overlap", "the trace has no copies to a device")
            else:
                text = f"{found.overlap:.1%} of the copies' time lies under kernels"
                bench.figure(f"ratio {ratio}: overlap", text, overlap=found.overlap)


def working_bytes(sizes: Mapping[str, Any], tokens: int, adapter: int) -> int:
    """Estimate what a step needs besides what stays: activations with recomputed layers, and room to work.

    In bytes, for hidden size h, intermediate size i, L layers, and an adapter of ``adapter`` bytes in float32:

    - ``2 h L`` per token for the layers' inputs;
    - ``40 h + 24 i`` per token for one layer that is computed again: its bfloat16 activations, the float32 copies that
      LoRA and the norms make, and their gradients;
    - ``2 h i`` for the largest weight, decoded;
    - ``adapter / 2`` for autocast's copy of the adapter in bfloat16;
    - 2 GiB for the tiled loss, the libraries' workspaces and what the allocator cannot use.
    """
    h, i, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    return int((2 * h * layers + 40 * h + 24 * i) * tokens + 2 * h * i + adapter // 2 + 2 * GIB)


def least_offload(capacity: int, kept: int, encoded: int, working: int, staging: int) -> int | None:
    """Return how many bytes of encoded weights may stay on the device; None if all of them fit.

    Args:
        capacity: bytes of the device.
        kept: what stays besides encoded weights: embeddings, head, norms, adapter, gradients and optimizer.
        encoded: all encoded weights.
        working: from :func:`working_bytes`.
        staging: for weights on their way, if any are offloaded.
    """
    if kept + encoded + working <= capacity:
        return None
    return max(0, capacity - kept - working - staging)


def headline(bench: Bench) -> None:
    """Train a 70B-shaped Llama with LoRA over fp8 on one card, with the least offload that fits."""
    import psutil
    import torch
    from arctic_plugins_huggingface.training.memory import plan_memory
    from gpu_models import plan_random, release, train

    capacity, sizes = bench.limit(), bench.sizes(LLAMA_70B)
    rows, tokens = (2, 16) if bench.small else (2, 1024)
    plugins: dict[str, Any] = {"fp8": {}, **LORA, "longseq": {}}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        plan = plan_random(directory, "llama", sizes, plugins, bench.device)
        encoded, largest = sum(plan.weights.resident.values()), max(plan.weights.resident.values())
        planned = plan_memory(plan, "adamw_torch_fused")[1]
        kept = sum(planned.values()) - encoded
        working = working_bytes(sizes, rows * tokens, planned["trainable"])
        del plan
        staging = 4 * largest  # the weight in use, two that are fetched ahead, and one that is being let go
        if capacity is None:  # pretend that half of the weights fit
            capacity = kept + encoded // 2 + working + staging
        text = f"encoded {size(encoded)} + kept {size(kept)} + working {size(working)} of {size(capacity)}"
        bench.figure("bytes", text, encoded=encoded, kept=kept, working=working, capacity=capacity)
        for lower in (0, 2 * GIB, 5 * GIB, 12 * GIB):
            room = min(capacity, kept + encoded + working) - lower
            budget = least_offload(room, kept, encoded, working, staging)
            moved = 0 if budget is None else encoded - budget
            name = f"LoRA over fp8, {rows} x {tokens} tokens, {moved / encoded:.1%} of the weights in host memory"
            if moved > 0.8 * psutil.virtual_memory().available:
                bench.skip(name, f"host memory is too small for {size(moved)}")
                return
            if lower and not bench.enough(80, name):
                return
            stack = plugins if budget is None else {**plugins, "offload": {"to": "host", "budget": budget}}
            try:
                plan = plan_random(directory, "llama", sizes, stack, bench.device)
                placed = 1 - sum(plan.weights.resident.values()) / encoded
                found = train(plan, stack, rows, tokens, steps=1 if bench.small else 4, gradient_checkpointing=True)
            except torch.OutOfMemoryError:
                bench.figure(name, "out of memory; with more offload again", out_of_memory=True)
                plan = None
                release()
                continue
            note = f", {placed:.1%} moved, {rows * tokens / found.median:.0f} tokens/s"
            _show(bench, name, found, note, moved_share=placed)
            if found.reserved is not None:
                fits = found.reserved <= capacity
                text = f"{size(found.reserved)} reserved, {size(found.peak)} used"
                bench.figure("peak memory", text, fits, size(capacity))
            _compare_plan(bench, "LoRA over fp8", found)
            return


def mixture(bench: Bench) -> None:
    """Train Mixtral-shaped layers over fp8, against transformers' grouped product in bfloat16."""
    from gpu_models import plan_random, release, train

    bench.limit()
    sizes, seconds = bench.sizes(MIXTRAL), {}
    rows, tokens = (2, 16) if bench.small else (4, 1024)
    with tempfile.TemporaryDirectory() as folder:
        for adapted, lora in {"attention": {"r": 16}, "experts": {"r": 16, "experts": True}}.items():
            for codec in ("bf16", "fp8"):
                name = f"{codec}, LoRA on {adapted}, {rows} x {tokens} tokens"
                if not bench.enough(10, name):
                    continue
                plugins = {**({"fp8": {}} if codec == "fp8" else {}), "lora": lora}
                options = {} if codec == "fp8" else {"experts_implementation": "grouped_mm"}
                plan = plan_random(Path(folder) / "model", "mixtral", sizes, plugins, bench.device, **options)
                found = train(plan, plugins, rows, tokens, steps=1 if bench.small else 4)
                del plan
                release()
                seconds[codec, adapted] = found.median
                _show(bench, name, found)
            if ratio := seconds.get(("fp8", adapted), 0) / seconds.get(("bf16", adapted), 1):
                bench.figure(f"LoRA on {adapted}: fp8's time to bf16's", f"{ratio:.2f}", ratio=ratio)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    section.__name__: section for section in (tests, kernels, step, headline, offload, mixture)
}


def main(arguments: Sequence[str] | None = None, add: Callable[[Figure], None] | None = None) -> None:
    """Run one section, and print its figures or pass them to ``add``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--memory", type=float, default=80)
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds since the epoch")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    add = add or (lambda figure: print(f"{MARK}{json.dumps(figure)}", flush=True))
    if options.device == "cuda":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would use all of them
    if options.device == "cuda" or options.section == "tests":
        os.environ.setdefault("CXX", "none")  # the kernels for CPUs take a minute to build, and are not measured
    if options.device == "cuda" and options.section not in ("tests", "kernels"):
        # Weights, and what encodes them, differ in size; without this, the allocator would split blocks for good.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if options.section != "tests":
        import torch

        card = "CPU"
        if options.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            memory = f"{properties.total_memory / GIB:.0f} GiB"
            card = f"{properties.name}, {memory}, sm_{properties.major}{properties.minor}, CUDA {torch.version.cuda}"
        add({"card": card})
    SECTIONS[options.section](Bench(options.device, options.small, options.memory, options.until, add))


if __name__ == "__main__":
    main()
