"""What RoPE scaling buys without training: SmolLM2-135M, trained on texts of up to 8,192 tokens, on longer ones.

    python benchmarks/rope.py TEXT [--lengths 4096 8192 16384] [--passkeys 4096 8192] [--depths 0.1 0.5 0.9] [--plot docs/rope.png] [--json FILE]

Perplexity by position: windows of TEXT (a file; WikiText-2's test split for the figures in the docs), mean over the positions of every bucket.
Passkey: five digits stand somewhere in repeated filler (Mohtashami and Jaggi, "Landmark Attention", 2023), and the most likely next tokens, one after
the other, have to be the digits. Every type is scaled to the longest length. Without a network: the model is the demo's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from arctic_plugins_huggingface import load_model
from arctic_plugins_huggingface.demo.model import smollm2

from arctic_plugins import Stack

ORIGINAL = 8192
TYPES = ("none", "linear", "dynamic", "ntk", "yarn")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def scaled(kind: str, longest: int, adapter: str | None = None) -> tuple[Any, Any]:
    """The model with RoPE scaled to ``longest`` tokens, with an adapter merged into it perhaps."""
    plugins = {} if kind == "none" else {"rope": {"type": kind, "max_position_embeddings": longest, "original_max_position_embeddings": ORIGINAL}}
    model, tokenizer = load_model(str(smollm2()), Stack.from_dict(plugins), dtype=torch.bfloat16)
    if adapter:
        from arctic_plugins.frozen.lora import load_adapter

        model = load_adapter(model, adapter).merge_and_unload()
    return model.eval(), tokenizer


@torch.no_grad()
def token_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """``[length - 1]``: negative log-likelihood of every token but the first; logits exist for 512 positions at a time."""
    hidden = model.model(ids[None], use_cache=False).last_hidden_state[0]
    parts = [
        torch.nn.functional.cross_entropy(model.lm_head(hidden[at : at + 512]).float()[: len(ids) - 1 - at], ids[at + 1 : at + 513], reduction="none")
        for at in range(0, len(ids) - 1, 512)
    ]
    return torch.cat(parts)


def passkey_prompt(tokenizer: Any, length: int, depth: float, seed: int) -> tuple[torch.Tensor, list[int]]:
    """Token ids of about ``length`` and those of the digits."""
    key = str(random.Random(seed).randrange(10000, 99999))
    head = "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
    needle = f"The pass key is {key}. Remember it. {key} is the pass key. "
    tail = "What is the pass key? The pass key is"
    count = (length - len(tokenizer(head + needle + tail).input_ids) - 16) / (len(tokenizer(FILLER * 64).input_ids) / 64)
    before = int(count * depth)
    text = head + FILLER * before + needle + FILLER * (int(count) - before) + tail
    return torch.tensor(tokenizer(text).input_ids), tokenizer(f" {key}").input_ids


@torch.no_grad()
def finds_passkey(model: Any, prompt: torch.Tensor, answer: list[int]) -> bool:
    """Whether every token of the answer is the most likely one after those before it, all in one pass."""
    ids = torch.cat([prompt, torch.tensor(answer)])
    hidden = model.model(ids[None], use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
    return model.lm_head(hidden).argmax(-1).tolist() == answer


def main() -> None:
    """Print two tables, and plot the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--passkeys", type=int, nargs="*", help="lengths of texts with a passkey, where they are not those of --lengths")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9])
    parser.add_argument("--adapter", help="measure this adapter over the last type as well")
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--plot")
    parser.add_argument("--json")
    options = parser.parse_args()
    longest, found = max(options.lengths), {}
    passkeys = options.lengths if options.passkeys is None else options.passkeys
    edges = [0, *options.lengths]
    text = options.text.read_text(encoding="utf-8")
    contenders = [(kind, None) for kind in options.types] + ([(options.types[-1], options.adapter)] if options.adapter else [])
    for kind, adapter in contenders:
        model, tokenizer = scaled(kind, longest, adapter)
        name = f"{kind}, trained" if adapter else kind
        found[name] = {"perplexity": {}, "passkey": {}}
        if not options.no_perplexity:
            ids = torch.tensor(tokenizer(text).input_ids)
            sums = [0.0] * len(options.lengths)
            for window in range(options.windows):
                losses = token_losses(model, ids[window * longest : (window + 1) * longest])
                for at, (first, last) in enumerate(itertools.pairwise(edges)):
                    sums[at] += losses[first : last - 1].mean().item() / options.windows
            found[name]["perplexity"] = {f"{first}-{last}": math.exp(s) for (first, last), s in zip(itertools.pairwise(edges), sums, strict=True)}
        print(name, json.dumps(found[name]), flush=True)
        for length in passkeys:
            right = [finds_passkey(model, *passkey_prompt(tokenizer, length, depth, seed=at)) for at, depth in enumerate(options.depths)]
            found[name]["passkey"][str(length)] = right
        print(name, json.dumps(found[name]), flush=True)
    if not options.no_perplexity:
        buckets = list(next(iter(found.values()))["perplexity"])
        print("\n| type | " + " | ".join(f"perplexity at {bucket}" for bucket in buckets) + " |\n|" + "---|" * (len(buckets) + 1))
        for name, result in found.items():
            print(f"| {name} | " + " | ".join(f"{result['perplexity'][bucket]:.1f}" for bucket in buckets) + " |")
    print("\n| type | " + " | ".join(f"passkey in {length}" for length in passkeys) + " |\n|" + "---|" * (len(passkeys) + 1))
    for name, result in found.items():
        cells = (f"{sum(right)} of {len(right)}" for right in result["passkey"].values())
        print(f"| {name} | " + " | ".join(cells) + " |")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    if options.plot and not options.no_perplexity:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        for name, result in found.items():
            pyplot.plot(options.lengths, list(result["perplexity"].values()), marker="o", label=name)
        pyplot.xscale("log", base=2)
        pyplot.yscale("log")
        pyplot.xticks(options.lengths, [str(length) for length in options.lengths])
        pyplot.xlabel("up to position")
        pyplot.ylabel("perplexity")
        pyplot.legend()
        pyplot.savefig(options.plot, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
