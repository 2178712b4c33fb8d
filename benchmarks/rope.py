"""What RoPE scaling gains, without training and with an adapter: SmolLM2-135M on texts longer than its training texts.

    python benchmarks/rope.py TEXT [--lengths 4096 8192 16384] [--passkeys 4096 8192] [--adapter DIR]
                              [--plot docs/rope.png] [--json FILE]

It was trained on texts of up to 8,192 tokens. Perplexity by position: windows of TEXT (a file; WikiText-2's test split
for the figures in the docs), averaged over the positions of each bucket. Pass keys: a passage of TEXT contains five
digits for each of several cities, at --depths, and all of them are asked for, as in `examples/long_context.py`. A key
counts as found if each of its digits is the most likely next token. Every type is scaled to the longest length. No
network is needed: the model is the demo's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import runpy
from pathlib import Path
from typing import Any

import torch
from arctic_plugins_demo.model import smollm2
from arctic_plugins_huggingface import load_model

from arctic_plugins import Stack

ORIGINAL = 8192
TYPES = ("none", "linear", "dynamic", "ntk", "yarn")
passage = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "long_context.py"))["passage"]


def scaled(kind: str, longest: int, adapter: str | None = None) -> tuple[Any, Any]:
    """The model with RoPE scaled to ``longest`` tokens, with an adapter merged into it perhaps."""
    plugins = (
        {}
        if kind == "none"
        else {"rope": {"type": kind, "max_position_embeddings": longest, "original_max_position_embeddings": ORIGINAL}}
    )
    model, tokenizer = load_model(str(smollm2()), Stack.from_dict(plugins), dtype=torch.bfloat16)
    if adapter:
        from arctic_plugins_huggingface.adapters.lora import load_adapter

        model = load_adapter(model, adapter).merge_and_unload()
    return model.eval(), tokenizer


@torch.no_grad()
def token_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """``[length - 1]``: negative log-likelihood of every token but the first; logits exist for 512 positions at a
    time.
    """
    hidden = model.model(ids[None], use_cache=False).last_hidden_state[0]
    parts = [
        torch.nn.functional.cross_entropy(
            model.lm_head(hidden[at : at + 512]).float()[: len(ids) - 1 - at], ids[at + 1 : at + 513], reduction="none"
        )
        for at in range(0, len(ids) - 1, 512)
    ]
    return torch.cat(parts)


def with_keys(
    tokenizer: Any, text: str, length: int, depths: list[float], seed: int
) -> tuple[torch.Tensor, dict[str, float], dict[str, list[int]]]:
    """Token ids of at most ``length``, the depth of each key in them, and the positions of the tokens that answer with
    each.
    """
    characters, count = 3 * length, 0
    while not 0.98 * length < count <= length:
        prompt, completion, keys = passage(text, characters, depths, random.Random(seed))
        whole = prompt + completion
        tokens = tokenizer(whole)
        count = len(tokens.input_ids)
        characters = int(characters * 0.99 * length / count)
    starts = {key: whole.rindex(key) for key in keys}
    positions = {
        key: sorted({tokens.char_to_token(at) for at in range(start, start + len(key))})
        for key, start in starts.items()
    }
    return torch.tensor(tokens.input_ids), keys, positions


@torch.no_grad()
def found_keys(model: Any, ids: torch.Tensor, positions: dict[str, list[int]]) -> list[str]:
    """The keys whose every token is the most likely one after those before it, all in one pass."""
    hidden = model.model(ids[None], use_cache=False).last_hidden_state[0]
    return [
        key
        for key, at in positions.items()
        if model.lm_head(hidden[[p - 1 for p in at]]).argmax(-1).tolist() == ids[at].tolist()
    ]


def main() -> None:
    """Print two tables, and plot the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument(
        "--passkeys", type=int, nargs="*", help="lengths of the texts with pass keys, if different from --lengths"
    )
    parser.add_argument("--depths", type=float, nargs="+", default=[0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
    parser.add_argument("--texts", type=int, default=4, help="number of texts with pass keys for each length")
    parser.add_argument("--adapter", help="also measure this adapter with the last type")
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--plot")
    parser.add_argument("--json")
    options = parser.parse_args()
    longest, found = max(options.lengths), {}
    passkeys = options.lengths if options.passkeys is None else options.passkeys
    edges = [0, *options.lengths]
    text = options.text.read_text(encoding="utf-8")
    contenders = [(kind, None) for kind in options.types] + (
        [(options.types[-1], options.adapter)] if options.adapter else []
    )
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
            found[name]["perplexity"] = {
                f"{first}-{last}": math.exp(s) for (first, last), s in zip(itertools.pairwise(edges), sums, strict=True)
            }
        print(name, json.dumps(found[name]), flush=True)
        for length in passkeys:
            right = dict.fromkeys(options.depths, 0)
            for seed in range(options.texts):
                ids, depths, positions = with_keys(tokenizer, text, length, options.depths, seed)
                for key in found_keys(model, ids, positions):
                    right[depths[key]] += 1
            found[name]["passkey"][str(length)] = {str(depth): count for depth, count in right.items()}
        print(name, json.dumps(found[name]), flush=True)
    if not options.no_perplexity:
        buckets = list(next(iter(found.values()))["perplexity"])
        print(
            "\n| type | "
            + " | ".join(f"perplexity at {bucket}" for bucket in buckets)
            + " |\n|"
            + "---|" * (len(buckets) + 1)
        )
        for name, result in found.items():
            print(f"| {name} | " + " | ".join(f"{result['perplexity'][bucket]:.1f}" for bucket in buckets) + " |")
    for length in map(str, passkeys):
        print(f"\nPass keys found in {options.texts} texts of {length} tokens, by depth\n")
        print("| type | " + " | ".join(map(str, options.depths)) + " | all |\n|" + "---|" * (len(options.depths) + 2))
        for name, result in found.items():
            counts = result["passkey"][length].values()
            print(
                f"| {name} | " + " | ".join(map(str, counts)) + f" | {sum(counts)} of {options.texts * len(counts)} |"
            )
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
