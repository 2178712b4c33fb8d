"""Expert parallelism over an emulated link: how much communication Arctic's hybrid layers hide.

It is hidden behind attention and the dense residual. Two processes with one thread each, gloo. Data from all-to-all
arrive ``bytes / rate`` after they were sent, one message after the other; waiting takes no processor time. For every
rate, three variants of the step (forward and backward) are interleaved in one run: as it is, with a wait for every
message where it is sent, and with a link that takes no time. The hidden share is (waiting - overlapped) / (waiting - no
link).

``python benchmarks/moe_overlap.py`` prints medians of several steps and their ratios; ``--json FILE`` saves them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from arctic_plugins_moe.config import MoEConfig
from torch import Tensor


class Link:
    """Stands in the place of ``torch.distributed.all_to_all_single``."""

    def __init__(self, rate: float = 0.0, *, waits: bool = False) -> None:
        self.rate, self.waits, self.free, self.nbytes = rate, waits, 0.0, 0.0
        self.stock = dist.all_to_all_single

    def __call__(self, output: Tensor, source: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        work = self.stock(output, source, *args, async_op=True, **kwargs)
        nbytes = source.nbytes / 2  # the other half stays here
        self.free = max(self.free, time.perf_counter()) + (nbytes / self.rate if self.rate else 0.0)
        self.nbytes += nbytes
        arriving = _Arriving(work, self.free)
        if async_op and not self.waits:
            return arriving
        arriving.wait()
        return _Arriving(None, 0.0)


class _Arriving:
    def __init__(self, work: Any, at: float) -> None:
        self.work, self.at = work, at

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        time.sleep(max(0.0, self.at - time.perf_counter()))


def layers(options: argparse.Namespace) -> Any:
    """Arctic layers whose experts are spread over the processes, and their input."""
    from arctic_plugins_huggingface import register
    from arctic_plugins_moe.configuration import ArcticConfig
    from arctic_plugins_moe.dispatch import ExpertParallel
    from arctic_plugins_moe.hf import ArcticModel

    register()
    config = ArcticConfig(
        vocab_size=64,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        num_local_experts=options.experts,
        num_experts_per_tok=2,
        moe_layer_frequency=1,
        parallel_attn_mlp_res=True,
    )
    model = ArcticModel(config).to(torch.bfloat16).train()
    model.set_experts_implementation(ExpertParallel.experts_implementation)
    dispatch = ExpertParallel(MoEConfig(expert_parallel=2, overlap_degree=options.degree))
    for layer in model.layers:
        experts = layer.block_sparse_moe.experts
        part = dispatch.local(options.experts)
        for leaf in ("gate_up_proj", "down_proj"):
            setattr(experts, leaf, torch.nn.Parameter(getattr(experts, leaf)[part].detach().clone()))
        experts.dispatch = dispatch
    x = torch.randn(1, options.tokens, options.hidden, dtype=torch.bfloat16)
    return model, x


def step(model: Any, x: Tensor, link: Link) -> tuple[float, float]:
    """Seconds of a step, the slower process's, and bytes sent in it."""
    dist.all_to_all_single, link.free, link.nbytes = link, 0.0, 0.0
    dist.barrier()
    started = time.perf_counter()
    model(inputs_embeds=x, use_cache=False).last_hidden_state.float().pow(2).mean().backward()
    seconds = torch.tensor([time.perf_counter() - started])
    dist.all_to_all_single = link.stock
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    model.zero_grad()
    return seconds.item(), link.nbytes


def process(rank: int, options: argparse.Namespace, store: str) -> None:
    """One of the two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x = layers(options)
    for _ in range(2):
        free, volume = step(model, x, Link())
    times: dict[tuple[float, str], list[float]] = defaultdict(list)
    for _ in range(options.repeat):
        for share in options.shares:
            rate = volume / (share * free)
            for kind, link in (("none", Link()), ("waiting", Link(rate, waits=True)), ("overlapped", Link(rate))):
                times[share, kind].append(step(model, x, link)[0])
    if rank == 0:
        rows = []
        for share in options.shares:
            none, waiting, overlapped = (
                statistics.median(times[share, kind]) for kind in ("none", "waiting", "overlapped")
            )
            hidden = (waiting - overlapped) / (waiting - none)
            rows.append({"share": share, "none": none, "waiting": waiting, "overlapped": overlapped, "hidden": hidden})
        print(
            "| communication / step without it | no link s | waiting s | overlapped s | overlapped / waiting | hidden |"
        )
        print("|---|---|---|---|---|---|")
        for row in rows:
            ratio = row["overlapped"] / row["waiting"]
            print(
                f"| {row['share']:.2f} | {row['none']:.3f} | {row['waiting']:.3f} | {row['overlapped']:.3f} | "
                f"{ratio:.2f} | {row['hidden']:.0%} |"
            )
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(rows, file, indent=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--degree", type=int, default=MoEConfig().overlap_degree, help="the plugin's overlap_degree")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.8])
    parser.add_argument("--json")
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.spawn(process, (parser.parse_args(), f"{directory}/store"), nprocs=2)
