"""Time to the first token by prompt length, up to 131,072 tokens, in the real vLLM engine on CPU.

    python benchmarks/long_prompts.py [--types yarn llama3] [--lengths 8192 16384 32768 65536 131071] [--json FILE]

A tiny Llama with yarn and llama3 scaling; chunked prefill of 4,096 tokens, float32, a KV cache of 1 GiB, one prompt at
a time, and a new prompt each time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LENGTH = 131072


def serve(checkpoint: str, lengths: list[int]) -> dict[str, float]:
    """In this process: length -> seconds, and the peak of resident memory in MB."""
    import random

    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        checkpoint,
        dtype="float32",
        enforce_eager=True,
        enable_chunked_prefill=True,
        max_num_batched_tokens=4096,
        max_num_seqs=2,
    )
    assert llm.model_config.max_model_len == LENGTH
    seconds = {}
    for length in lengths:
        prompt = TokensPrompt(
            prompt_token_ids=[random.Random(length).randrange(5, 260)] + [7 + at % 200 for at in range(length - 1)]
        )
        started = time.perf_counter()
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        seconds[str(length)] = time.perf_counter() - started
    return {**seconds, "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["yarn", "llama3"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536, LENGTH - 1])
    parser.add_argument("--json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\nRESULT " + json.dumps(serve(options.child, options.lengths)))
        return
    from arctic_plugins_huggingface import load_model, save_checkpoint

    from arctic_plugins import Stack
    from arctic_plugins.testing import tiny_llama

    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = tiny_llama(
            Path(folder) / "plain", max_position_embeddings=2048, num_hidden_layers=2, num_key_value_heads=1
        )
        for kind in options.types:
            stack = Stack.from_dict({"rope": {"type": kind, "max_position_embeddings": LENGTH}})
            checkpoint = save_checkpoint(*load_model(plain, stack), Path(folder) / kind, stack)
            command = [sys.executable, __file__, "--child", str(checkpoint), "--lengths", *map(str, options.lengths)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found[kind] = json.loads(
                next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT ")
            )
    columns = list(next(iter(found.values())))
    print("| type | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for kind, row in found.items():
        print(
            f"| {kind} | "
            + " | ".join(f"{value:.1f}" if key != "peak MB" else f"{value:.0f}" for key, value in row.items())
            + " |"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
