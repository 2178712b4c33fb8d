"""One linear layer: fp8 compared with float32, bfloat16 and other libraries' weight-only formats, all in one run.

    pip install torchao bitsandbytes        # for comparison; those that are missing are skipped
    python benchmarks/fp8_linear.py [--dtype bfloat16] [--plot docs/fp8_linear.png] [--json result.json]

The columns `float32` and `bf16` are `nn.Linear` with weights and inputs in that dtype. All other contenders get inputs
in the dtype that `dtype: auto` selects on this processor for a bfloat16 checkpoint, or in ``--dtype``. Caches are cold:
every contender runs through as many layers as make 256 MB of fp8 weights, and contenders take turns after each set of
layers, so that other load on the machine affects all of them. A cell is the median time per layer over all rounds. Very
slow contenders run through fewer layers, twice. On a busy machine, ``--busy`` counts the time in which the only thread
had a processor instead of the time that passed. Memory bandwidth is measured in the same run: reading is torch's sum of
512 MB in one tensor, and its sum over the same weights; copying is its copy of 512 MB (bytes read and written).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from arctic_plugins_bnb.codec import Int8Codec, NF4Codec
from arctic_plugins_bnb.ops import compiled
from arctic_plugins_fp8 import kernels
from arctic_plugins_fp8.codec import CANDIDATES, LARGEST_WEIGHT, FP8Codec
from torch import Tensor, nn

from arctic_plugins.compute import compute_dtype, dtype_name
from arctic_plugins.frozen import FrozenLinear

SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64, 512, 1024)
MEGABYTES = 256
OURS = ("fp8", "fp8 g128", "fp6", "fp12")


PLAIN = {"float32": torch.float32, "bf16": torch.bfloat16}


clock = time.perf_counter


def layers(weight_NK: Tensor, dtype: torch.dtype, only: list[str] | None = None) -> dict[str, nn.Module]:
    """The weight in every contender's form, or in that of ``only`` some, for inputs in ``dtype``."""
    out_features, in_features = weight_NK.shape
    made: dict[str, nn.Module] = {}
    for name, stored in PLAIN.items():
        made[name] = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=stored)
        made[name].weight = nn.Parameter(weight_NK.to(stored), requires_grad=False)
    plain = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype)
    plain.weight = nn.Parameter(weight_NK.to(dtype), requires_grad=False)
    codecs = (FP8Codec(), FP8Codec(group_size=128), FP8Codec(bits=6, group_size=128), FP8Codec(bits=12))
    for name, codec in zip(OURS, codecs, strict=True):
        made[name] = FrozenLinear.from_linear(plain, codec)
        made[name].encode(weight_NK)
    bnb = {"bnb int8": Int8Codec(), "bnb nf4": NF4Codec(), "bnb nf4 double": NF4Codec(double_quant=True)}
    for name, codec in bnb.items():
        made[name] = FrozenLinear.from_linear(plain, codec)
        made[name].encode(weight_NK)
    made["aten int8pack"] = Int8Pack(weight_NK, dtype)
    for add in (_torchao, _bitsandbytes):
        if only and not any(name.startswith(add.__name__[1:]) for name in only):
            continue
        try:
            made |= add(plain)
        except ImportError as error:
            print(f"skipped: {error}")
    return {name: layer for name, layer in made.items() if not only or name in only}


class Int8Pack(nn.Module):
    """``aten._weight_int8pack_mm``: int8 codes, and a scale per output channel in the dtype of the inputs."""

    def __init__(self, weight_NK: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        scale_N = weight_NK.float().abs().amax(1) / 127
        self.codes, self.scale = (weight_NK.float() / scale_N[:, None]).round().to(torch.int8), scale_N.to(dtype)

    def forward(self, x_MK: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x_MK, self.codes, self.scale)


def _torchao(plain: nn.Linear) -> dict[str, nn.Module]:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    made = {}
    for name, config in (("torchao float8", Float8WeightOnlyConfig()), ("torchao int8", Int8WeightOnlyConfig())):
        holder = nn.Sequential(
            nn.Linear(plain.in_features, plain.out_features, bias=False, device="meta", dtype=plain.weight.dtype)
        )
        holder[0].weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
        quantize_(holder, config)
        made[name] = holder[0]
    return made


def _bitsandbytes(plain: nn.Linear) -> dict[str, nn.Module]:
    import bitsandbytes as bnb

    size = (plain.in_features, plain.out_features)
    int8 = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
    int8.weight = bnb.nn.Int8Params(plain.weight.detach(), has_fp16_weights=False, requires_grad=False)
    nf4 = bnb.nn.Linear4bit(*size, bias=False, quant_type="nf4", compute_dtype=plain.weight.dtype)
    nf4.weight = bnb.nn.Params4bit(plain.weight.detach(), requires_grad=False, quant_type="nf4")
    # in training mode, bitsandbytes decodes nf4 even where it has a kernel
    return {"bitsandbytes int8": int8.to("cpu").eval(), "bitsandbytes nf4": nf4.to("cpu").eval()}


def interleaved(contenders: dict[str, Callable[[], object]], seconds: float, least: int) -> dict[str, float]:
    """Median seconds of each, taking turns for about ``seconds`` in all and ``least`` rounds after one to warm up; what
    takes over 3 s, one.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start, rounds = time.perf_counter(), 0
    while rounds <= least or time.perf_counter() - start < seconds:
        for name, run in contenders.items():
            if rounds > 1 and times[name][0] > 3:
                continue
            begin = clock()
            run()
            times[name].append(clock() - begin)
        rounds += 1
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    begin = clock()
    run()
    return clock() - begin


def bandwidth() -> tuple[float, float]:
    """Bytes per second that torch reads, and that it copies (read and written)."""
    source = torch.ones(MEGABYTES * 2**20 // 2)
    target = torch.empty_like(source)
    times = interleaved({"read": source.sum, "copy": lambda: target.copy_(source)}, 3, 7)
    return source.nbytes / times["read"], 2 * source.nbytes / times["copy"]


def measure(
    shape: tuple[int, int],
    dtype: torch.dtype,
    only: list[str] | None = None,
    all_rows: tuple[int, ...] = ROWS,
    limit: float = 15,
) -> dict[str, object]:
    """All of it for one shape ``(N, K)`` and inputs in ``dtype``; with ``only``, the table of these contenders.

    Every line of the table takes about ``limit`` seconds.
    """
    out_features, in_features = shape
    count = max(2, -(-MEGABYTES * 2**20 // (out_features * in_features)))
    made = []
    for _ in range(count):
        made.append(layers(torch.randn(shape).mul_(0.02).bfloat16(), dtype, only))
    read, copy = bandwidth()
    print(
        f"\n### N = {out_features}, K = {in_features}: {count} layers; memory reads {read / 1e9:.1f} GB/s, copies "
        f"{copy / 1e9:.1f} GB/s\n"
    )
    names = list(made[0])
    print(f"| M | {' | '.join(names)} | fp8 / the faster plain |\n|{'---|' * (len(names) + 2)}")
    table: dict[str, dict[str, float]] = {}

    def walk(name: str, x_MK: Tensor, steps: int = count) -> Callable[[], None]:
        def run() -> None:
            for layer in made[:steps]:
                layer[name](x_MK)

        return run

    for rows in all_rows:
        x_MK = torch.randn(rows, in_features)
        inputs = {name: x_MK.to(PLAIN.get(name, dtype)) for name in names}
        with torch.inference_mode():
            steps = {name: max(1, min(count, round(0.5 / seconds(walk(name, inputs[name], 1))))) for name in names}
            times = interleaved({name: walk(name, inputs[name], steps[name]) for name in names}, limit, 4)
        table[str(rows)] = {name: taken / steps[name] * 1e3 for name, taken in times.items()}
        cells = " | ".join(f"{milliseconds:.3g}" for milliseconds in table[str(rows)].values())
        best = min(table[str(rows)][name] for name in PLAIN if name in names)
        print(f"| {rows} | {cells} | {table[str(rows)]['fp8'] / best:.2f} |", flush=True)
    if only:
        return {"count": count, "read": read, "copy": copy, "milliseconds": table}
    ours = {name: made[0][name].codec.nbytes(shape) for name in OURS}
    for name, size in ours.items():
        codes = [layer[name].weight.view(torch.int64) for layer in made]
        with torch.inference_mode():
            x_MK = torch.randn(1, in_features, dtype=dtype)
            times = interleaved(
                {name: walk(name, x_MK), "sum": lambda codes=codes: [code.sum() for code in codes]}, 3, 5
            )
        speed, same = count * size / times[name], count * size / times["sum"]
        print(
            f"\nM = 1, {name}: weights read at {speed / 1e9:.1f} GB/s; torch sums the same bytes at {same / 1e9:.1f} "
            "GB/s",
            end="",
        )
    return {
        "count": count,
        "read": read,
        "copy": copy,
        "milliseconds": table,
        "train": train(made, in_features, dtype),
        "encode": encode(made, copy),
    }


def train(made: list[dict[str, nn.Module]], in_features: int, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of forward and backward (of the input) at M = 1024."""
    plain = next(name for name, stored in PLAIN.items() if stored == dtype)

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            for layer in made:
                x_MK = torch.randn(1, in_features, dtype=dtype).expand(1024, -1).contiguous().requires_grad_()
                y_MN = layer[name](x_MK)
                y_MN.backward(torch.ones_like(y_MN))

        return run

    times = interleaved({name: step(name) for name in (plain, *OURS)}, 20, 5)
    ratios = ", ".join(f"{name} {seconds / times[plain]:.2f}" for name, seconds in times.items())
    print(f"\n\nforward + backward, M = 1024, relative to the time of {plain}: {ratios}")
    return {name: seconds / len(made) * 1e3 for name, seconds in times.items()}


def encode(made: list[dict[str, nn.Module]], copy: float) -> dict[str, float]:
    """Bytes per second (bfloat16 weights read, codes written) of encoding, into memory that is there already, as the
    copy is.
    """
    weights, speeds = [layer["bf16"].weight for layer in made], {}
    for name in OURS:
        codec = made[0][name].codec
        buffers = [codec.encode(weight) for weight in weights]

        def run(codec: FP8Codec = codec, buffers: list[dict[str, Tensor]] = buffers) -> None:
            for weight, encoded in zip(weights, buffers, strict=True):
                kernels.encode(
                    weight, encoded[""], encoded["_scale"], codec.bits, LARGEST_WEIGHT, CANDIDATES[codec.scale]
                )

        speeds[name] = (
            sum(weight.nbytes + codec.nbytes(tuple(weight.shape)) for weight in weights)
            / interleaved({name: run}, 2, 3)[name]
        )
    print(
        "\nencode: "
        + ", ".join(f"{name} {speed / 1e9:.1f} GB/s = {speed / copy:.0%} of copying" for name, speed in speeds.items())
    )
    return speeds


def plot(results: dict[str, dict[str, object]], path: Path) -> None:
    """Speed over the faster plain layer by rows of x, one panel per shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results) + 1.5, 4))
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)
    for axis, (title, result) in zip(axes[0], results.items(), strict=True):
        table = result["milliseconds"]
        rows = [int(row) for row in table]
        for name in next(iter(table.values())):
            axis.plot(
                rows,
                [min(row[plain] for plain in PLAIN) / row[name] for row in table.values()],
                marker=".",
                label=name,
                linewidth=2.5 if name == "fp8" else 1,
            )
        axis.set(title=title, xlabel="rows of x (M)", xscale="log", yscale="log", xticks=rows, xticklabels=rows)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed over the faster nn.Linear")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure every shape, print tables, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=dtype_name(compute_dtype(torch.bfloat16)),
        help="dtype of the inputs",
    )
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", action="append", help="a contender; repeat it for several, among them bf16 and fp8")
    parser.add_argument("--rows", type=int, action="append", help="rows of x; repeat it for several")
    parser.add_argument("--shape", type=int, nargs=2, action="append", help="N and K; repeat it for several")
    parser.add_argument("--seconds", type=float, default=15, help="for each line of a table")
    parser.add_argument("--busy", action="store_true", help="count processor time, of one thread")
    arguments = parser.parse_args()
    if arguments.busy:
        global clock
        clock = time.thread_time
        torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp8 {kernels.describe()[1]}, bnb CPU: "
        f"{compiled.describe()[1]}, inputs in {arguments.dtype}"
    )
    results = {
        f"{shape[0]} x {shape[1]}": measure(
            shape, getattr(torch, arguments.dtype), arguments.only, tuple(arguments.rows or ROWS), arguments.seconds
        )
        for shape in map(tuple, arguments.shape or SHAPES)
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
