"""One linear layer: fp8 against bfloat16 and the weight-only formats of other libraries, all in one run.

    pip install torchao bitsandbytes        # peers; those that are missing are left out
    python benchmarks/fp8_linear.py [--plot docs/fp8_linear.png] [--json result.json]

Caches are cold: every contender walks over as many layers as make 256 MB of fp8 weights, and contenders take turns, layer set by layer set, so that
what else the machine does meets all of them. A cell is the median over rounds of the time per layer. The bandwidth of memory is measured in the same
run: reading is torch's sum of 512 MB in one tensor, and its sum over the same weights; copying is its copy of 512 MB (bytes read and written).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from arctic_plugins_fp8 import kernels
from arctic_plugins_fp8.codec import CANDIDATES, LARGEST_WEIGHT, FP8Codec
from torch import Tensor, nn

from arctic_plugins.frozen import FrozenLinear

SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64, 512, 1024)
MEGABYTES = 256
OURS = ("fp8", "fp8 g128", "fp6", "fp12")


def layers(weight_NK: Tensor) -> dict[str, nn.Module]:
    """The weight in every contender's form."""
    out_features, in_features = weight_NK.shape
    plain = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=torch.bfloat16)
    plain.weight = nn.Parameter(weight_NK, requires_grad=False)
    made: dict[str, nn.Module] = {"bf16": plain}
    codecs = (FP8Codec(), FP8Codec(group_size=128), FP8Codec(bits=6, group_size=128), FP8Codec(bits=12))
    for name, codec in zip(OURS, codecs, strict=True):
        made[name] = FrozenLinear.from_linear(plain, codec)
        made[name].encode(weight_NK)
    made["aten int8pack"] = Int8Pack(weight_NK)
    for add in (_torchao, _bitsandbytes):
        try:
            made |= add(plain)
        except ImportError as error:
            print(f"left out: {error}")
    return made


class Int8Pack(nn.Module):
    """``aten._weight_int8pack_mm``: int8 codes and a bfloat16 scale per output channel."""

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__()
        scale_N = weight_NK.float().abs().amax(1) / 127
        self.codes, self.scale = (weight_NK.float() / scale_N[:, None]).round().to(torch.int8), scale_N.bfloat16()

    def forward(self, x_MK: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x_MK, self.codes, self.scale)


def _torchao(plain: nn.Linear) -> dict[str, nn.Module]:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    made = {}
    for name, config in (("torchao float8", Float8WeightOnlyConfig()), ("torchao int8", Int8WeightOnlyConfig())):
        holder = nn.Sequential(nn.Linear(plain.in_features, plain.out_features, bias=False, device="meta", dtype=torch.bfloat16))
        holder[0].weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
        quantize_(holder, config)
        made[name] = holder[0]
    return made


def _bitsandbytes(plain: nn.Linear) -> dict[str, nn.Module]:
    import bitsandbytes as bnb

    size = (plain.in_features, plain.out_features)
    int8 = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
    int8.weight = bnb.nn.Int8Params(plain.weight.detach(), has_fp16_weights=False, requires_grad=False)
    nf4 = bnb.nn.Linear4bit(*size, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    nf4.weight = bnb.nn.Params4bit(plain.weight.detach(), requires_grad=False, quant_type="nf4")
    return {"bnb int8": int8.to("cpu"), "bnb nf4": nf4.to("cpu")}


def interleaved(contenders: dict[str, Callable[[], object]], seconds: float, least: int) -> dict[str, float]:
    """Median seconds of each, taking turns for about ``seconds`` each and at least ``least`` rounds after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start, rounds = time.perf_counter(), 0
    while rounds <= least or time.perf_counter() - start < seconds:
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def bandwidth() -> tuple[float, float]:
    """Bytes per second that torch reads, and that it copies (read and written)."""
    source = torch.ones(MEGABYTES * 2**20 // 2)
    target = torch.empty_like(source)
    times = interleaved({"read": source.sum, "copy": lambda: target.copy_(source)}, 3, 7)
    return source.nbytes / times["read"], 2 * source.nbytes / times["copy"]


def measure(shape: tuple[int, int]) -> dict[str, object]:
    """All of it for one shape ``(N, K)``."""
    out_features, in_features = shape
    count = max(2, -(-MEGABYTES * 2**20 // (out_features * in_features)))
    made = [layers(torch.randn(shape).mul_(0.02).bfloat16()) for _ in range(count)]
    read, copy = bandwidth()
    print(f"\n### N = {out_features}, K = {in_features}: {count} layers; memory reads {read / 1e9:.1f} GB/s, copies {copy / 1e9:.1f} GB/s\n")
    names = list(made[0])
    print(f"| M | {' | '.join(names)} | fp8 / bf16 |\n|{'---|' * (len(names) + 2)}")
    table: dict[str, dict[str, float]] = {}

    def walk(name: str, x_MK: Tensor) -> Callable[[], None]:
        def run() -> None:
            for layer in made:
                layer[name](x_MK)

        return run

    for rows in ROWS:
        x_MK = torch.randn(rows, in_features).bfloat16()
        with torch.inference_mode():
            times = interleaved({name: walk(name, x_MK) for name in names}, 5, 4)
        table[str(rows)] = {name: seconds / count * 1e3 for name, seconds in times.items()}
        cells = " | ".join(f"{milliseconds:.3g}" for milliseconds in table[str(rows)].values())
        print(f"| {rows} | {cells} | {times['fp8'] / times['bf16']:.2f} |", flush=True)
    ours = {name: made[0][name].codec.nbytes(shape) for name in OURS}
    for name, size in ours.items():
        codes = [layer[name].weight.view(torch.int64) for layer in made]
        with torch.inference_mode():
            x_MK = torch.randn(1, in_features).bfloat16()
            times = interleaved({name: walk(name, x_MK), "sum": lambda codes=codes: [code.sum() for code in codes]}, 3, 5)
        speed, same = count * size / times[name], count * size / times["sum"]
        print(f"\nM = 1, {name}: weights read at {speed / 1e9:.1f} GB/s; torch sums the same bytes at {same / 1e9:.1f} GB/s", end="")
    return {"count": count, "read": read, "copy": copy, "milliseconds": table, "train": train(made, in_features), "encode": encode(made, copy)}


def train(made: list[dict[str, nn.Module]], in_features: int) -> dict[str, float]:
    """Milliseconds of forward and backward (of the input) at M = 1024."""

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            for layer in made:
                x_MK = torch.randn(1, in_features).bfloat16().expand(1024, -1).contiguous().requires_grad_()
                y_MN = layer[name](x_MK)
                y_MN.backward(torch.ones_like(y_MN))

        return run

    times = interleaved({name: step(name) for name in ("bf16", *OURS)}, 10, 5)
    ratios = ", ".join(f"{name} {seconds / times['bf16']:.2f}" for name, seconds in times.items())
    print(f"\n\nforward + backward, M = 1024, of bf16's time: {ratios}")
    return {name: seconds / len(made) * 1e3 for name, seconds in times.items()}


def encode(made: list[dict[str, nn.Module]], copy: float) -> dict[str, float]:
    """Bytes per second (bfloat16 weights read, codes written) of encoding, into memory that is there already, as the copy is."""
    weights, speeds = [layer["bf16"].weight for layer in made], {}
    for name in OURS:
        codec = made[0][name].codec
        buffers = [codec.encode(weight) for weight in weights]

        def run(codec: FP8Codec = codec, buffers: list[dict[str, Tensor]] = buffers) -> None:
            for weight, encoded in zip(weights, buffers, strict=True):
                kernels.encode(weight, encoded[""], encoded["_scale"], codec.bits, LARGEST_WEIGHT, CANDIDATES[codec.scale])

        speeds[name] = sum(weight.nbytes + codec.nbytes(tuple(weight.shape)) for weight in weights) / interleaved({name: run}, 2, 3)[name]
    print(f"\nencode: {', '.join(f'{name} {speed / 1e9:.1f} GB/s = {speed / copy:.0%} of copying' for name, speed in speeds.items())}")
    return speeds


def plot(results: dict[str, dict[str, object]], path: Path) -> None:
    """Speed over bf16 by rows of x, one panel per shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results) + 1.5, 4))
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)
    for axis, (title, result) in zip(axes[0], results.items(), strict=True):
        table = result["milliseconds"]
        rows = [int(row) for row in table]
        for name in next(iter(table.values())):
            axis.plot(rows, [row["bf16"] / row[name] for row in table.values()], marker=".", label=name, linewidth=2.5 if name == "fp8" else 1)
        axis.set(title=title, xlabel="rows of x (M)", xscale="log", yscale="log", xticks=rows, xticklabels=rows)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed over bf16 nn.Linear")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure every shape, print tables, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {kernels.describe()[1]}")
    results = {f"{shape[0]} x {shape[1]}": measure(shape) for shape in SHAPES}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
