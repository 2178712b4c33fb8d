"""Latency of vLLM with and without speculation: the same requests for every variant, in turn, one at a time.

    arctic demo --out out/demo          # makes the model for SQL
    python benchmarks/speculation.py --demo out/demo --out out/speculation.json

Every variant has an engine in a process of its own. They all run at once, but only one of them has a request at a time,
so that all see the same machine; ratios are medians over requests, each compared with the first variant's latency for
the same request. ``cpu`` is the processor time of the engine's process, which other programs disturb less.

Workloads: questions of the demo's test split for the fine-tuned model; for the model that it was made from, code to be
copied with a change, and open questions. Engines that remember answers are first asked ``--history`` other questions of
the workload; the first ``--warm`` requests after that are not counted either. Engines are those of ``arctic serve``:
compiled, but not for encoded weights on CPU, unless ``--eager``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FORK = get_context("fork")
NGRAM = {"speculate": {"method": "ngram"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32": {"dtype": "float32"},
    "bf16 suffix": {"plugins": {"speculate": {}}},
    "bf16 ngram": {"plugins": NGRAM},
    "fp8": {"encoded": True},
    "fp8 suffix": {"encoded": True, "plugins": {"speculate": {}}},
    "fp8 ngram": {"encoded": True, "plugins": NGRAM},
}
ROWS = (1, 2, 4, 8)
"""Numbers of requests side by side, each of which has one row in a step."""
SYSTEM = "You write SQL."
CODE = [
    "Rename the variable {old} to {new} in this code, and repeat all of the code:\n\n{code}",
    "Repeat this code with a comment above every function:\n\n{code}",
    "Repeat this code, and add a function {new} in the same style:\n\n{code}",
]
FUNCTION = """def {name}(values):
    {total} = 0
    for value in values:
        {total} = {total} {sign} value
    return {total}
"""
CHAT = [
    "How do plants make energy from sunlight?",
    "Write a short story about a lighthouse keeper.",
    "What should I see in Rome in two days?",
    "Explain what a database index is to a child.",
    "Give me advice for a job interview.",
    "Why is the sky blue, and sunsets red?",
    "How do I bake bread without yeast?",
    "Describe the differences between cats and dogs.",
    "What is the meaning of the word 'entropy'?",
    "Write a poem about autumn.",
    "How does a refrigerator work?",
    "Which habits help people to sleep well?",
]


def requests(workload: str, count: int) -> list[dict[str, Any]]:
    """Return requests: messages and the longest answer."""
    if workload == "sql":
        from arctic_plugins_demo.text_to_sql import generate

        system = {"role": "system", "content": SYSTEM}
        examples = generate(count, seed=0, split="test")
        return [{"chat": [system, {"role": "user", "content": each.prompt}], "tokens": 48} for each in examples]
    if workload == "code":
        names = [("total", "result"), ("sum", "amount"), ("count", "number"), ("score", "points")]
        texts = []
        for index in range(count):
            old, new = names[index % len(names)]
            code = "\n".join(
                FUNCTION.format(name=f"{verb}_{index}", total=old, sign=sign)
                for verb, sign in (("add", "+"), ("subtract", "-"), ("multiply", "*"))
            )
            texts.append(CODE[index % len(CODE)].format(old=old, new=new, code=code))
    else:
        texts = [CHAT[index % len(CHAT)] for index in range(count)]
    return [{"chat": [{"role": "user", "content": text}], "tokens": 64} for text in texts]


def serve_requests(job: dict[str, Any], log: Path, connection: Connection) -> None:
    """Run in a process of its own: an engine that answers each request from ``connection``."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from arctic_plugins_vllm.serving import engine_args
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(**engine_args(job["model"], job.get("plugins"), **job["llm"]), disable_log_stats=False)
    tokenizer, steps, step = llm.get_tokenizer(), 0, llm.llm_engine.step

    def counting() -> Any:
        nonlocal steps
        steps += 1
        return step()

    def counters() -> dict[str, float]:
        return {
            each.name.rpartition("_num_")[2]: each.value
            for each in llm.get_metrics()
            if "spec_decode_num" in each.name and hasattr(each, "value")
        }

    llm.llm_engine.step = counting
    connection.send({"dtype": str(llm.model_config.dtype)})
    while (request := connection.recv()) is not None:
        ids = tokenizer.apply_chat_template(request["chat"], add_generation_prompt=True, return_dict=False)
        prompts = [TokensPrompt(prompt_token_ids=ids)] * request.get("rows", 1)
        sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos="rows" in request)
        before, steps = counters(), 0
        started, worked = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        found = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - worked, "steps": steps}
        after = counters()
        found |= {name: value - before.get(name, 0) for name, value in after.items()}
        found["answer"] = list(outputs[0].outputs[0].token_ids)
        connection.send(found)


class Engine:
    """A process with an engine. It is forked, so that vLLM is imported once."""

    def __init__(self, job: dict[str, Any], log: Path) -> None:
        self._connection, other = FORK.Pipe()
        self._process = FORK.Process(target=serve_requests, args=(job, log, other), daemon=True)
        self._process.start()
        other.close()
        try:
            self.about = self._connection.recv()
        except EOFError:
            raise SystemExit(log.read_text()[-3000:]) from None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._connection.send(request)
        return self._connection.recv()

    def close(self) -> None:
        self._connection.send(None)
        self._process.join(60)


def prepare(threads: int) -> None:
    """Import vLLM as all engines need it."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all engines would share the first cores
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(threads),
        "NUMBA_NUM_THREADS": str(threads),  # else vLLM's n-grams start a thread for each core
        "KMP_BLOCKTIME": "1",  # threads of idle engines do not spin
    }
    for name in ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.v1.attention.backends.cpu_attn"):
        import_module(name)


def plain_sql_model(demo: Path, base: str, out: Path) -> None:
    """Merge the demo's adapter into the plain base model, in bfloat16."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = demo / "training" / "final"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(out)


def summary(found: list[dict[str, Any]], stock: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one variant for one workload; ``stock`` are those of the first variant."""
    seconds, tokens = [each["seconds"] for each in found], sum(len(each["answer"]) for each in found)
    pairs = list(zip(found, stock, strict=True))
    drafted = sum(each.get("draft_tokens", 0) for each in found)
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * sorted(seconds)[-1 - len(seconds) // 100],
        "speed": statistics.median(other["seconds"] / each["seconds"] for each, other in pairs),
        "cpu_speed": statistics.median(other["cpu"] / each["cpu"] for each, other in pairs),
        "tokens": tokens,
        "tokens_per_step": tokens / sum(each["steps"] for each in found),
        "drafted": drafted,
        "accepted": sum(each.get("accepted_tokens", 0) for each in found) / drafted if drafted else None,
        "same_answers": sum(each["answer"] == other["answer"] for each, other in pairs) / len(pairs),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="what 'arctic demo' made")
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the model that it started from")
    parser.add_argument("--requests", type=int, default=36, help="requests of each workload")
    parser.add_argument("--history", type=int, default=150, help="questions before, to engines that remember answers")
    parser.add_argument("--warm", type=int, default=2, help="requests before them, which are not counted")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="the first is what the others are compared with")
    parser.add_argument("--workloads", default="sql,code,chat")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--eager", action="store_true", help="compile nothing (a minute less for each engine)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prepare(args.threads)
    from arctic_plugins.compute import processor

    names, workloads = args.variants.split(","), args.workloads.split(",")
    result: dict[str, Any] = {"machine": f"{processor()[0]}, {args.threads} threads", "workloads": {}, "rows": {}}
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        models = {"sql": None, "base": args.base}
        if "sql" in workloads:
            models["sql"] = str(where / "sql")
            merging = FORK.Process(target=plain_sql_model, args=(args.demo, args.base, where / "sql"))
            merging.start()  # not here: threads that have computed do not survive a fork
            merging.join()
        for kind in ("sql", "base"):
            asked = [name for name in workloads if (name == "sql") == (kind == "sql")]
            if not asked:
                continue
            engines = {}
            for name in names:
                variant = VARIANTS[name]
                job = {
                    "model": models[kind],
                    "plugins": {**({"fp8": {}} if variant.get("encoded") else {}), **variant.get("plugins", {})}
                    or None,
                    "llm": {
                        "max_model_len": 1024,
                        "max_num_seqs": max(ROWS),
                        "kv_cache_memory_bytes": 1 << 28,
                        "seed": 0,
                        **({"enforce_eager": True} if args.eager else {}),
                        **({"dtype": variant["dtype"]} if "dtype" in variant else {}),
                    },
                }
                engines[name] = Engine(job, where / f"{kind} {name}.log")
                print(f"{kind}: {name} is up ({engines[name].about['dtype']})", file=sys.stderr, flush=True)
            for workload in asked:
                found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
                every = requests(workload, args.history + args.warm + args.requests)
                for request in every[: args.history]:
                    for name in names:
                        if "suffix" in name:
                            engines[name].ask(request)
                every = every[args.history :]
                for index, request in enumerate(every):
                    for name in names:
                        found[name].append(engines[name].ask(request))
                    print(f"{workload} {index + 1}/{len(every)}", file=sys.stderr, flush=True)
                counted = {name: each[args.warm :] for name, each in found.items()}
                result["workloads"][workload] = {name: summary(counted[name], counted[names[0]]) for name in names}
            plain = [name for name in names if "plugins" not in VARIANTS[name]]
            if kind == "base":
                times: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in ROWS} for name in plain}
                for _ in range(3):
                    for rows in ROWS:
                        for name in plain:
                            answer = engines[name].ask({**requests("chat", 1)[0], "tokens": 25, "rows": rows})
                            times[name][rows].append(answer["cpu"] / answer["steps"])
                result["rows"] = {
                    name: {rows: 1e3 * min(each) for rows, each in found.items()} for name, found in times.items()
                }
            for engine in engines.values():
                engine.close()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(report(result))


def report(result: dict[str, Any]) -> str:
    """Return the tables, in Markdown."""
    lines = [result["machine"], ""]
    for workload, variants in result["workloads"].items():
        lines += [
            f"| {workload} | median ms | p99 ms | speed | speed, cpu | tokens per step | accepted |",
            "|---" * 7 + "|",
        ]
        for name, row in variants.items():
            accepted = "" if row["accepted"] is None else f"{row['accepted']:.0%} of {row['drafted']:.0f}"
            figures = [f"{row[key]:.0f}" for key in ("median_ms", "p99_ms")]
            figures += [f"{row[key]:.2f}" for key in ("speed", "cpu_speed", "tokens_per_step")]
            lines.append(f"| {name} | {' | '.join(figures)} | {accepted} |")
        lines.append("")
    if result["rows"]:
        lines += ["| cpu ms of a step with rows | " + " | ".join(map(str, ROWS)) + " |", "|---" * (len(ROWS) + 1) + "|"]
        lines += [
            f"| {name} | " + " | ".join(f"{each:.1f}" for each in row.values()) + " |"
            for name, row in result["rows"].items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
