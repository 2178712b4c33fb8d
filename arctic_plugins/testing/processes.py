"""Real processes for tests of distributed code, and the training run that such tests compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arctic_plugins.testing.forks import check, outputs_noted, trainers

__all__ = ["QUIET_RUN", "run_processes", "run_python", "said", "say", "small_engine"]

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


def small_engine(cache: Path | str, **others: str) -> dict[str, str]:
    """Return environment variables for a process in which vLLM serves a tiny model on a CPU.

    They give it 1 GB for keys and values, two threads, and no separate engine process.

    Args:
        cache: directory for compiled code.
        others: variables to add or to override.
    """
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(cache),
        "OMP_NUM_THREADS": "2",
        **others,
    }


def run_python(
    *arguments: Any,
    status: int | None = 0,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENT ...`` in a new interpreter and return its exit status and both outputs as strings.

    Use it to test how an interpreter starts, imports and exits. Anything else is faster in a fork: :func:`trainers`,
    :func:`engines`.

    Args:
        arguments: ``script, ...``, ``"-m", module, ...`` or ``"-c", source, ...``; strings and paths are passed as they
            are, anything else as JSON.
        status: the expected exit status; None accepts any.
        environment: variables in addition to those of this process.
        timeout: seconds.
        options: further arguments of ``subprocess.run``, such as ``cwd``.

    Raises:
        AssertionError: the status differs; the message shows the ends of both outputs.
        subprocess.TimeoutExpired: after ``timeout`` seconds, once the process has been killed, with the same ends as a
            note.
    """
    command = [sys.executable, *_texts(arguments)]
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "env": {**os.environ, **(environment or {})},
        **options,
    }
    with outputs_noted():
        done = subprocess.run(command, check=False, encoding="utf-8", errors="replace", timeout=timeout, **options)
    return check(done, status)


def run_processes(
    script: Path, processes: int, *arguments: Any, timeout: float = 300, status: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Run ``python SCRIPT ARGUMENT ...`` in ``processes`` processes like ``torchrun``, with one thread each.

    The processes are forks of one that has already imported the libraries.

    Args:
        script: a script that calls ``torch.distributed.init_process_group`` itself.
        processes: number of processes.
        arguments: strings and paths are passed as they are, anything else as JSON, with paths in it as strings.
        timeout: seconds after which ``subprocess.TimeoutExpired`` is raised.
        status: exit status of the first process that fails; 0 if none may fail, None to accept any.

    Raises:
        AssertionError: the status differs; the message shows the ends of both outputs.
    """
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }  # shows where the threads of a process that aborts were
    command = [script, *_texts(arguments)]
    return trainers().run(command, processes=processes, environment=environment, timeout=timeout, status=status)


def _texts(arguments: tuple[Any, ...]) -> list[str]:
    return [
        str(argument) if isinstance(argument, (str, Path)) else json.dumps(argument, default=str)
        for argument in arguments
    ]


def say(what: Any) -> None:
    """Print ``what`` as a line of JSON in a single write, so that lines of several processes do not mix.

    :func:`said` reads them.
    """
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def said(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Return the dictionaries that the processes of ``done`` printed with :func:`say`, ignoring other output."""
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
