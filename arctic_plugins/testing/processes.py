"""Real processes for tests of what several do together, and the runs that are compared in them."""

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
"""``TrainingArguments`` of a short run whose log is all that is wanted: every step in it, gradients clipped."""


def small_engine(cache: Path | str, **others: str) -> dict[str, str]:
    """Variables of a process in which vLLM serves a tiny model on a CPU: 1 GB for keys and values, two threads, no
    process of the engine's own.

    Args:
        cache: where it keeps what it compiles.
        others: variables besides these, or instead.
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
    """``python ARGUMENT ...`` in a new interpreter, and both outputs as texts when it has ended. It is for tests of how
    an interpreter starts, imports and ends; anything else is faster in a fork: :func:`trainers`, :func:`engines`.

    Args:
        arguments: ``script, ...``, ``"-m", module, ...`` or ``"-c", source, ...``; texts and paths as they are,
            anything else as JSON.
        status: with which it has to end; None: any is fine.
        environment: variables besides those of this process.
        timeout: seconds.
        options: of ``subprocess.run``: ``cwd``, ``preexec_fn`` and so on.

    Raises:
        AssertionError: it ended with another status; the message shows the ends of both outputs.
        subprocess.TimeoutExpired: after ``timeout`` seconds, when it has been killed; with the same ends as a note.
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
    """``python SCRIPT ARGUMENT ...`` in ``processes`` processes as of ``torchrun``, with one thread each, forked from
    one that has imported.

    Args:
        script: calls ``torch.distributed.init_process_group`` itself.
        processes: how many.
        arguments: texts and paths as they are, anything else as JSON, paths in it as texts.
        timeout: seconds, after which ``subprocess.TimeoutExpired`` is raised.
        status: with which the first that fails has to end, all of them with 0; None: any is fine.

    Raises:
        AssertionError: they ended otherwise; the message shows the ends of both outputs.
    """
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }  # of a process that aborts: where its threads were
    command = [script, *_texts(arguments)]
    return trainers().run(command, processes=processes, environment=environment, timeout=timeout, status=status)


def _texts(arguments: tuple[Any, ...]) -> list[str]:
    return [
        str(argument) if isinstance(argument, (str, Path)) else json.dumps(argument, default=str)
        for argument in arguments
    ]


def say(what: Any) -> None:
    """Print ``what`` as a line of JSON in one write: lines of several processes do not mix. :func:`said` reads it."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def said(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """The dictionaries that the processes of ``done`` have said (:func:`say`), without what else was printed."""
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
