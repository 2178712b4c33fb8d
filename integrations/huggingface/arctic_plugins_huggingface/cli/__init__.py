"""Subcommands of ``arctic`` for the Hugging Face host. Modules here import nothing heavy until a command runs."""

from __future__ import annotations

import sys

__all__ = ["quiet_hosts"]


def quiet_hosts() -> None:
    """No progress bars of the hosts where nobody sees them move: not a terminal."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
