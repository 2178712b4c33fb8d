"""Subcommands of ``arctic`` for the Hugging Face host. Modules here import nothing heavy until a command runs."""

from __future__ import annotations

import os
import sys

__all__ = ["quiet_hosts"]


def quiet_hosts() -> None:
    """No progress bars of the hosts where nobody sees them move: not a terminal. No word from DeepSpeed that there is no GPU, on standard output."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
