"""``arctic acme-0-1-command``: how many bytes the tensors of a checkpoint take."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click
from arctic_plugins.errors import CheckpointError

__all__ = ["command"]

LONGEST = 100_000_000
"""Largest number of bytes in the header of a file, according to the format."""


@click.command("acme-0-1-command", short_help="Show how many bytes a checkpoint's tensors take.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(checkpoint: Path, as_json: bool) -> None:
    """Show how many bytes the tensors in the directory CHECKPOINT take, by dtype.

    \b
    Example:
      arctic acme-0-1-command out/merged
    """
    found = sizes(checkpoint)
    click.echo(json.dumps(found) if as_json else "\n".join(f"{dtype:8}{size:>16,}" for dtype, size in found.items()))


def sizes(checkpoint: Path) -> dict[str, int]:
    """Return the bytes of all tensors by dtype, the largest first. Only headers of files are read.

    Raises:
        CheckpointError: there are no safetensors files, or one of them is damaged.
    """
    found: Counter[str] = Counter()
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{checkpoint} contains no safetensors files", fix="name the directory of a checkpoint")
    for path in files:
        try:  # a header: its length in 8 bytes, then as much JSON (https://huggingface.co/docs/safetensors)
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, LONGEST)))
            for name, tensor in header.items():
                if name != "__metadata__":
                    start, stop = tensor["data_offsets"]
                    found[tensor["dtype"]] += stop - start
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} has no valid header", fix="the file is damaged: copy it again") from error
    return dict(found.most_common())
