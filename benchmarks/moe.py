"""Forward and backward of one mixture of experts on CPU in bfloat16.

The contenders are transformers' implementations, this project's, DeepSpeed's layer, and fp8 experts. They run
interleaved in one run; figures are medians, and every contender's result is checked before it is timed. Sizes are those
of Arctic's and Mixtral's layers, scaled down so that weights and gradients fit into memory. "plain" rows train the
experts; "frozen" rows compute gradients only for the tokens, as with adapters.

``python benchmarks/moe.py``; ``--json FILE`` saves the figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `arctic train` does, for everyone here
import torch
from torch import Tensor, nn

SHAPES = {"arctic": (1024, 704, 128), "mixtral": (1536, 5376, 8)}
"""Hidden size, intermediate size, experts; the released ones are (7168, 4864, 128) and (4096, 14336, 8)."""


SLOW = 3.0
"""Seconds; what takes longer is timed once."""


class Contender:
    """One step of a layer; :meth:`clear` frees the gradients of the step before, outside of what is timed."""

    def __init__(
        self,
        module: Any,
        x: Tensor,
        implementation: str | None = None,
        *,
        trains: bool = True,
        forward: Callable[[], Tensor],
    ) -> None:
        self.module, self.x, self.implementation, self.trains, self.forward = module, x, implementation, trains, forward

    def clear(self) -> None:
        self.x.grad = None
        for parameter in self.module.parameters():
            parameter.grad = None

    def __call__(self) -> Tensor:
        for parameter in self.module.parameters():
            parameter.requires_grad_(self.trains and parameter.dtype == torch.bfloat16)
        if self.implementation is not None:
            self.module.config._experts_implementation = self.implementation
        y = self.forward()
        y.backward(torch.ones_like(y))
        return y.detach()


def contenders(name: str, tokens: int, *, with_deepspeed: bool) -> dict[str, Contender]:
    """Name -> one step, which returns the output."""
    from arctic_plugins_fp8.codec import FP8Codec
    from arctic_plugins_huggingface import register
    from arctic_plugins_huggingface.loading.weights import FrozenHostExperts
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    from arctic_plugins.frozen import FrozenWeight

    register()
    hidden, inner, number = SHAPES[name]
    config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=number, num_experts_per_tok=2)
    torch.manual_seed(0)
    experts = MixtralExperts(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.02)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16).requires_grad_()
    weights, index = torch.randn(tokens, number).softmax(-1).topk(2)
    weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)

    def step(module: Any, implementation: str | None, *, trains: bool) -> Contender:
        return Contender(module, x, implementation, trains=trains, forward=lambda: module(x, index, weights))

    found: dict[str, Contender] = {}
    for trains, kind in ((True, "plain"), (False, "frozen")):
        for implementation in ("eager", "batched_mm", "grouped_mm", "arctic"):
            if implementation == "batched_mm" and tokens * 2 * 3 * hidden * inner * 2 > 3e9:
                continue  # it copies an expert's weights for every token
            found[f"{kind} {implementation}"] = step(experts, implementation, trains=trains)
    frozen = FrozenHostExperts(copy.copy(experts), torch.bfloat16)
    for leaf in ("gate_up_proj", "down_proj"):
        plain = getattr(experts, leaf)
        weight = FrozenWeight(tuple(plain.shape), FP8Codec(), leaf)
        frozen.add_weight(leaf, weight, device="meta")
        frozen.hold(FP8Codec().encode(plain.detach()), leaf)
    found["frozen fp8"] = step(frozen, None, trains=False)
    if with_deepspeed:
        found["plain deepspeed"] = deepspeed_step(experts, x, number)
    return found


def deepspeed_step(experts: Any, x: Tensor, number: int) -> Contender:
    """DeepSpeed's MoE layer with the same experts and a router of its own; nothing is dropped."""
    from deepspeed.moe.layer import MoE

    inner = experts.down_proj.shape[-1]

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(x.shape[1], 2 * inner, bias=False), nn.Linear(inner, x.shape[1], bias=False)

        def forward(self, rows: Tensor) -> Tensor:
            gate, up = self.up(rows).chunk(2, -1)
            return self.down(nn.functional.silu(gate) * up)

    layer = MoE(x.shape[1], Expert(), num_experts=number, k=2, drop_tokens=False, min_capacity=0).to(torch.bfloat16)
    layer.set_deepspeed_parallelism()

    return Contender(layer, x, forward=lambda: layer(x[None])[0][0])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256, 4096])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--no-deepspeed", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if not options.no_deepspeed:
        os.environ.update(
            DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29517"
        )
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    rows = []
    print("| layer | tokens | contender | ms | ours / it |\n|---|---|---|---|---|")
    for name in options.shapes:
        for tokens in options.tokens:
            runs = contenders(name, tokens, with_deepspeed=not options.no_deepspeed)
            results = {}
            for contender, run in runs.items():
                results[contender] = run()
                run.clear()
            for contender, result in results.items():
                if contender != "plain deepspeed":
                    error = (result - results["plain eager"]).float().norm() / results["plain eager"].float().norm()
                    assert error < (0.06 if "fp8" in contender else 0.02), (contender, error)
            times: dict[str, list[float]] = defaultdict(list)
            for turn in range(options.repeat):
                for contender, run in runs.items():
                    if turn and times[contender][0] > SLOW:
                        continue
                    started = time.perf_counter()
                    run()
                    times[contender].append(time.perf_counter() - started)
                    run.clear()
            medians = {contender: statistics.median(seconds) for contender, seconds in times.items()}
            for contender, seconds in sorted(medians.items()):
                ratio = medians["plain arctic" if contender.startswith("plain") else "frozen arctic"] / seconds
                rows.append(
                    {"layer": name, "tokens": tokens, "contender": contender, "seconds": seconds, "ours / it": ratio}
                )
                print(f"| {name} | {tokens} | {contender} | {1e3 * seconds:.1f} | {ratio:.2f} |", flush=True)
            del runs, results
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
