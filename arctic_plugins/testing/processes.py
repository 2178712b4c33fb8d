"""Real processes for tests of distributed code, and the training run that such tests compare."""

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
"""``TrainingArguments`` of a short run of which only the log is needed: it logs every step and clips gradients."""


def run_processes(
    script: Path, processes: int, *arguments: Any, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``python SCRIPT ARGUMENT ...`` in ``processes`` processes like ``torchrun``, with one thread each.

    The processes are forks of one that has already imported the libraries.

    Args:
        script: a script that calls ``torch.distributed.init_process_group`` itself.
        processes: number of processes.
        arguments: strings and paths are passed as they are, anything else as JSON, with paths in it as strings.
        timeout: seconds after which ``subprocess.TimeoutExpired`` is raised.
    """
    texts = [
        str(argument) if isinstance(argument, (str, Path)) else json.dumps(argument, default=str)
        for argument in arguments
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }  # shows where the threads of a process that aborts were
    return trainers().run([script, *texts], processes=processes, env=environment, timeout=timeout)


def say(what: Any) -> None:
    """Print ``what`` as a line of JSON in a single write, so that lines of several processes do not mix."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
