"""Data for `long_context.yaml`: passages of a text that contain pass keys of several cities, followed by a question
that asks for all of them.

    python examples/long_context.py TEXT examples/long_context.jsonl [--rows 64] [--keys 8] [--shortest 2000] [--longest
    16000] [--seed 0]

TEXT is a file of prose. The lengths are in characters, about four to a token, and their logarithms are spread evenly.
Asking for all of several keys in one text is the "multi-query needles" task of Hsieh et al., "RULER", 2024: every text
teaches, or measures, many retrievals.
"""

import argparse
import json
import math
import random
from pathlib import Path

CITIES = (
    "Amsterdam",
    "Athens",
    "Berlin",
    "Boston",
    "Cairo",
    "Delhi",
    "Dublin",
    "Geneva",
    "Houston",
    "Lima",
    "Lisbon",
    "London",
    "Madrid",
    "Oslo",
    "Paris",
)


def passage(text: str, length: int, depths: list[float], draw: random.Random) -> tuple[str, str, dict[str, float]]:
    """A prompt, its completion, and key -> depth. The prompt is a piece of ``text`` of ``length`` characters with a key
    at each of the depths (0 to 1).

    The question asks for the keys in a different order from the text.
    """
    start, count, depths = draw.randrange(len(text) - length), len(depths), sorted(depths)
    filler, parts, at = (
        text[start : start + length],
        ["There are pass keys hidden in this text. Find and memorize them."],
        0,
    )
    cities, keys = draw.sample(CITIES, count), [str(key) for key in draw.sample(range(10000, 100000), count)]
    needles = [f"The pass key of {city} is {key}." for city, key in zip(cities, keys, strict=True)]
    for depth, needle in zip(depths, needles, strict=True):
        until = max(at, filler.rfind(" ", 0, int(depth * length) + 1))  # between two words
        parts += [filler[at:until].strip(), f"{needle} Remember it."]
        at = until
    parts += [filler[at:].strip(), "What are the pass keys?"]
    question, answers = " ".join(draw.sample(needles, count)).split(" is ", 1)
    return " ".join(parts) + f" {question} is", f" {answers}", dict(zip(keys, depths, strict=True))


def main() -> None:
    """Write one JSON record (prompt, completion) per line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument(
        "--keys",
        type=int,
        default=8,
        choices=range(1, len(CITIES) + 1),
        metavar="N",
        help=f"keys in each text, at most {len(CITIES)}",
    )
    parser.add_argument("--shortest", type=int, default=2000)
    parser.add_argument("--longest", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, text = random.Random(options.seed), options.text.read_text(encoding="utf-8")
    if options.longest >= len(text):
        parser.error(
            f"{options.text} has {len(text):,} characters; passages of --longest {options.longest:,} need more"
        )
    with options.out.open("w", encoding="utf-8") as file:
        for _ in range(options.rows):
            length = int(math.exp(draw.uniform(math.log(options.shortest), math.log(options.longest))))
            prompt, completion, _ = passage(text, length, [draw.random() for _ in range(options.keys)], draw)
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


if __name__ == "__main__":
    main()
