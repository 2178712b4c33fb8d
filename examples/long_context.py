"""Data for `long_context.yaml`: passages of a text in which five digits stand somewhere, and the question for them.

    python examples/long_context.py TEXT examples/long_context.jsonl [--rows 64] [--shortest 1000] [--longest 16000] [--seed 0]

TEXT is a file of prose; the lengths are in characters, about four to a token, spread evenly over their logarithms.
"""

import argparse
import json
import math
import random
from pathlib import Path

QUESTION = "What is the pass key? The pass key is"


def main() -> None:
    """Write one JSON record (prompt, completion) a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, text = random.Random(options.seed), options.text.read_text(encoding="utf-8")
    with options.out.open("w", encoding="utf-8") as file:
        for _ in range(options.rows):
            length = int(math.exp(draw.uniform(math.log(options.shortest), math.log(options.longest))))
            start, key = draw.randrange(len(text) - length), draw.randrange(10000, 100000)
            passage = text[start : start + length]
            at = passage.find(" ", draw.randrange(length)) % length  # between two words
            needle = f" The pass key is {key}. Remember it. {key} is the pass key. "
            prompt = f"There is important information hidden inside a lot of irrelevant text. {passage[:at]}{needle}{passage[at:]} {QUESTION}"
            file.write(json.dumps({"prompt": prompt, "completion": f" {key}"}) + "\n")


if __name__ == "__main__":
    main()
