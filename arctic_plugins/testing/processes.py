"""Real processes for tests of what several do together, and the runs that are compared in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from arctic_plugins.testing.forks import trainers

__all__ = ["QUIET_RUN", "run_processes", "say"]

QUIET_RUN: dict[str, Any] = {
    "learning_rate": 1e-2,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "ddp_find_unused_parameters": False,
    "seed": 1,
}
"""``TrainingArguments`` of a short run whose log is all that is wanted: every step in it, gradients clipped."""


def run_processes(
    script: Path, processes: int, *arguments: Any, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """``python SCRIPT ARGUMENT ...`` in ``processes`` processes as of ``torchrun``, with one thread each, forked from
    one that has imported.

    Args:
        script: calls ``torch.distributed.init_process_group`` itself.
        processes: how many.
        arguments: texts and paths as they are, anything else as JSON, paths in it as texts.
        timeout: seconds, after which ``subprocess.TimeoutExpired`` is raised.
    """
    texts = [
        str(argument) if isinstance(argument, (str, Path)) else json.dumps(argument, default=str)
        for argument in arguments
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }  # of a process that aborts: where its threads were
    return trainers().run([script, *texts], processes=processes, env=environment, timeout=timeout)


def say(what: Any) -> None:
    """Print ``what`` as a line of JSON in one write: lines of several processes do not mix."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
