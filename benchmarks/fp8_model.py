"""Whole models: fp8 (and for accuracy bnb) compared with float32, bfloat16 and other libraries' weight-only formats.

    python benchmarks/fp8_model.py vllm [MODEL] [--eager] [--floor]          # tokens/s in vLLM
    python benchmarks/fp8_model.py perplexity MODEL wikitext2-test.txt       # perplexity of a real model
    python benchmarks/fp8_model.py lora MODEL alpaca.json                    # loss and seconds of LoRA steps

vllm: the default model is a random Llama of 1.1B parameters. Engines run one after the other in separate processes, in
two rounds; a number is the better of an engine's two runs. fp8 computes in the dtype that `dtype: auto` selects here
for a bfloat16 checkpoint. Decoding is the time for 64 more tokens after the first, with prompts of 8; prefill is the
time to the first token of a prompt of 1,024, skipped if the processor has no instructions for the dtype (it would take
minutes). "products left out" is fp8 with zeros in place of every product with an encoded weight or the head: the time
that vLLM takes for everything else, which no kernel can reduce. perplexity: windows of 1,024 tokens, bfloat16
arithmetic. lora: r=16 on every linear module, bfloat16 arithmetic, the same batches of 4 x 256 tokens for both models,
which take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from arctic_plugins.compute import compute_dtype, is_native

STACKS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp12": {"fp8": {"bits": 12}},
    "fp8": {"fp8": {}},
    "fp8 mse": {"fp8": {"scale": "mse"}},
    "fp8 g128 mse": {"fp8": {"group_size": 128, "scale": "mse"}},
    "fp6 g128 max": {"fp8": {"bits": 6, "scale": "max"}},
    "fp6 g128": {"fp8": {"bits": 6}},
    "fp6 g32": {"fp8": {"bits": 6, "group_size": 32}},
    "bnb int8": {"bnb": {"type": "int8"}},
    "bnb nf4": {"bnb": {}},
    "bnb nf4 double": {"bnb": {"double_quant": True}},
}


def run_vllm(arguments: argparse.Namespace) -> None:
    """Compare engines."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    own = "float32" if compute_dtype(torch.bfloat16) == torch.float32 else "bfloat16"
    with tempfile.TemporaryDirectory() as name:
        plain, encoded = Path(name, "bf16"), Path(name, "fp8")
        if arguments.model is None:
            config = LlamaConfig(
                vocab_size=32000,
                hidden_size=2048,
                intermediate_size=5632,
                num_hidden_layers=22,
                num_attention_heads=32,
                num_key_value_heads=4,
            )
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
        else:
            AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).save_pretrained(plain)
        _encode(plain, encoded)
        engines = {
            "float32": (plain, "float32", False),
            "bf16": (plain, "bfloat16", False),
            "fp8": (encoded, own, False),
        }
        if arguments.eager:
            engines |= {f"{name} eager": (path, dtype, True) for name, (path, dtype, _) in engines.items()}
        if arguments.floor:
            engines["fp8, products left out"] = (encoded, own, False)
        best: dict[str, dict[str, float]] = {}
        for round_ in range(2):
            for engine, (path, dtype, eager) in engines.items():
                taken = _engine(path, dtype, *["--eager"] * eager, *["--floor"] * engine.endswith("left out"))
                print(f"round {round_}, {engine}: {taken}", file=sys.stderr, flush=True)
                for key, seconds in taken.items():
                    times = best.setdefault(engine, {})
                    times[key] = min(seconds, times.get(key, math.inf))
        print("| engine | batch 1, tokens/s | batch 8, tokens/s | first token of 1,024, s |\n|---|---|---|---|")
        fastest = {
            key: min(times.get(key, math.inf) for engine, times in best.items() if "fp8" not in engine)
            for key in ("1", "8", "prefill")
        }
        for engine, times in best.items():
            cells = [
                f"{int(batch) * 64 / times[batch]:.1f} ({fastest[batch] / times[batch]:.2f}x)" for batch in ("1", "8")
            ]
            cells.append(
                f"{times['prefill']:.2f} ({fastest['prefill'] / times['prefill']:.2f}x)" if "prefill" in times else ""
            )
            print(f"| {engine} | {' | '.join(cells)} |")


def _encode(plain: Path, encoded: Path) -> None:
    from arctic_plugins_huggingface import register
    from arctic_plugins_huggingface.loading.load import freeze
    from transformers import AutoModelForCausalLM

    from arctic_plugins import Stack

    register()
    freeze(
        AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16), Stack.from_dict({"fp8": {}})
    ).save_pretrained(encoded)


def _engine(path: Path, dtype: str, *options: str) -> dict[str, float]:
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable, __file__, "engine", str(path), "--dtype", dtype, *options]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_engine(arguments: argparse.Namespace) -> None:
    """Time one engine, in this process."""
    from vllm import LLM, SamplingParams

    if arguments.floor:
        from arctic_plugins_fp8 import kernels

        kernels.describe()  # loads what is replaced
        without = torch.library.Library("arctic_fp8", "IMPL", "CPU")
        for name in ("linear", "linear_bf16"):
            without.impl(name, lambda x, weight, *_: x.new_zeros((*x.shape[:-1], weight.shape[0])), allow_override=True)
    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        skip_tokenizer_init=True,
        enforce_eager=arguments.eager,
        max_model_len=2048,
        max_num_seqs=8,
        enable_prefix_caching=False,
    )

    def seconds(prompts: int, length: int, tokens: int) -> float:
        drawn = torch.randint(3, 31000, (prompts, length)).tolist()
        options = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids} for ids in drawn], options, use_tqdm=False)
        return time.perf_counter() - start

    seconds(8, 8, 4)
    result = {
        str(batch): statistics.median(seconds(batch, 8, 65) - seconds(batch, 8, 1) for _ in range(3))
        for batch in (1, 8)
    }
    if is_native(getattr(torch, arguments.dtype), "cpu"):
        result["prefill"] = statistics.median(seconds(1, 1024, 1) for _ in range(3))
    print(json.dumps(result))


def run_perplexity(arguments: argparse.Namespace) -> None:
    """Compare formats."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(arguments.model)(
        Path(arguments.data).read_text(), return_tensors="pt"
    ).input_ids[0]
    windows = tokens[: len(tokens) // 1024 * 1024].view(-1, 1024)[: arguments.windows]
    print(
        f"{len(windows)} windows of 1,024 tokens\n\n| format | perplexity | over bf16 | MB of linear weights "
        "|\n|---|---|---|---|",
        flush=True,
    )
    plain = 0.0
    for name, load in _formats(arguments.model):
        if arguments.only and name not in arguments.only:
            continue
        model, size = load()
        with torch.inference_mode():
            losses = [model(input_ids=window[None], labels=window[None]).loss.double() for window in windows]
        perplexity = math.exp(torch.stack(losses).mean())
        plain = plain or perplexity
        print(f"| {name} | {perplexity:.3f} | {perplexity / plain - 1:+.2%} | {size / 1e6:.1f} |", flush=True)


def _formats(checkpoint: str) -> Iterator[tuple[str, Callable[[], tuple[Any, int]]]]:
    from arctic_plugins_huggingface import load_model
    from arctic_plugins_huggingface.loading.weights import weight_specs
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from arctic_plugins import Stack

    def ours(plugins: dict[str, Any]) -> tuple[Any, int]:
        model, _ = load_model(checkpoint, Stack.from_dict(plugins), dtype=torch.bfloat16)
        modules = [model.get_submodule(name) for name in weight_specs(model) if name != "lm_head"]
        return model, sum(
            parameter.nbytes for module in modules for name, parameter in module.named_parameters() if name != "bias"
        )

    def bnb(**options: Any) -> tuple[Any, int]:
        config = BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"], **options)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
        )
        return model, _bytes(model)

    def torchao(config: Any) -> tuple[Any, int]:
        from torchao.quantization import quantize_

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        quantize_(
            model, config, filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head"
        )
        return model, 0

    for name, plugins in STACKS.items():
        yield name, lambda plugins=plugins: ours(plugins)
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        yield "torchao float8", lambda: torchao(Float8WeightOnlyConfig())
        yield "torchao int8", lambda: torchao(Int8WeightOnlyConfig())
    except ImportError as error:
        print(f"skipped: {error}")
    try:
        import bitsandbytes  # noqa: F401

        yield "bitsandbytes int8", lambda: bnb(load_in_8bit=True)
        yield (
            "bitsandbytes nf4",
            lambda: bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
        )
    except ImportError as error:
        print(f"skipped: {error}")


def _bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if "_proj.weight" in name)


def run_lora(arguments: argparse.Namespace) -> None:
    """Train both, step by step."""
    from arctic_plugins_huggingface import load_model
    from transformers import AutoTokenizer

    from arctic_plugins import Stack

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    records = json.loads(Path(arguments.data).read_text())
    texts = [
        f"{record['instruction']}\n{record.get('input', '')}\n{record['output']}{tokenizer.eos_token}"
        for record in records
    ]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lora, groups = {"lora": {"r": 16}}, {"group_size": 128, "scale": "mse"}
    stacks: dict[str, dict[str, Any]] = {
        "bf16": lora,
        "fp8": {"fp8": {}, **lora},
        "fp8 g128 mse": {"fp8": groups, **lora},
    }
    models, optimizers = {}, {}
    for name, plugins in stacks.items():
        torch.manual_seed(0)
        models[name] = load_model(arguments.model, Stack.from_dict(plugins), dtype=torch.bfloat16)[0].train()
        optimizers[name] = torch.optim.AdamW([p for p in models[name].parameters() if p.requires_grad], lr=2e-4)
    losses: dict[str, list[float]] = {name: [] for name in stacks}
    times: dict[str, list[float]] = {name: [] for name in stacks}
    for step in range(arguments.steps):
        chosen = [texts[(4 * step + at) % len(texts)] for at in range(4)]
        batch = tokenizer(chosen, return_tensors="pt", padding="max_length", truncation=True, max_length=256)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        for name, model in models.items():
            torch.manual_seed(step)
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            times[name].append(time.perf_counter() - start)
            losses[name].append(loss.item())
    mean = {name: statistics.mean(values) for name, values in losses.items()}
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"| base | mean loss of {arguments.steps} steps | s/step (median) |\n|---|---|---|")
    for name in stacks:
        print(
            f"| {name} | {mean[name]:.4f} ({mean[name] / mean['bf16'] - 1:+.2%}) | {median[name]:.3f} "
            f"({median[name] / median['bf16']:.2f}x) |"
        )


def main() -> None:
    """Run one of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    vllm = commands.add_parser("vllm")
    vllm.add_argument("model", nargs="?")
    vllm.add_argument("--eager", action="store_true", help="also run without compilation")
    vllm.add_argument("--floor", action="store_true", help="also run fp8 without its products")
    vllm.set_defaults(run=run_vllm)
    engine = commands.add_parser("engine", help=argparse.SUPPRESS)
    engine.add_argument("model")
    engine.add_argument("--dtype", required=True)
    engine.add_argument("--eager", action="store_true")
    engine.add_argument("--floor", action="store_true")
    engine.set_defaults(run=run_engine)
    for name, run in (("perplexity", run_perplexity), ("lora", run_lora)):
        command = commands.add_parser(name)
        command.add_argument("model")
        command.add_argument("data")
        command.set_defaults(run=run)
    commands.choices["perplexity"].add_argument("--windows", type=int, help="number of windows to use; default: all")
    commands.choices["perplexity"].add_argument("--only", action="append", help="a format; repeat it for several")
    commands.choices["lora"].add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
