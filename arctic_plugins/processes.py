"""What a launcher (torchrun, accelerate, DeepSpeed) has told this process about itself and the others.

No other module reads it.
"""

from __future__ import annotations

import os

__all__ = ["is_first", "is_first_here", "is_launched", "world_size"]


def is_launched() -> bool:
    """Return whether a launcher started this process."""
    return "RANK" in os.environ


def world_size() -> int:
    """Return how many processes were started, on all machines; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this is the process that prints and writes for all."""
    return os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Return whether this is the first process on its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
