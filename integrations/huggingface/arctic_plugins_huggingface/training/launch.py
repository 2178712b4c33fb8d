"""``arctic train --nproc``: a run in several processes, with one progress bar, one log, and the error that came first.

torch's elastic agent (``torch.distributed.launcher``, read in torch 2.13) starts and ends the processes; on several
hosts, a plugin's launcher does.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from arctic_plugins.discovery import process_registry

__all__ = ["end_with_launcher", "launch", "launch_on_hosts"]

_LAUNCHER = "ARCTIC_LAUNCHER"
"""Environment variable that holds the launcher's process id."""
_PATIENCE = 300
"""Seconds that processes have to finish and save the current step when the run is stopped."""
_LINES = 40
"""Lines shown from the standard error of a process that failed."""


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``arctic`` with ``arguments`` in ``processes`` processes on this machine and wait.

    The output of the first process is shown as it comes, that of another process only if it fails first.

    Returns:
        The exit status: 0, that of the process that failed first, or 130 after SIGINT or SIGTERM, which all processes
            receive.
    """
    command = ["-m", "arctic_plugins.cli", *arguments]
    with tempfile.TemporaryDirectory(prefix="arctic-train-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="run",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="spawn",
            shutdown_timeout=_PATIENCE,
            logs_specs=DefaultLogsSpecs(
                folder, redirects={rank: Std.ALL if rank else Std.ERR for rank in range(processes)}
            ),
        )
        os.environ.update(_environment(processes))
        for name in ("agent.server.api", "multiprocessing.api"):  # they repeat what the processes report
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
        shown = _Shown(Path(folder))
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            shown.stop()
            if (rank or failure.exitcode < 0) and not shown.says_itself(rank):
                _show_failure(rank, shown.errors(rank) if rank else "", failure.exitcode)
            shown.rest()
            return failure.exitcode if failure.exitcode in (1, 2, 130) else 1
        except SignalException:
            shown.stop()
            shown.rest()
            return 130
        shown.stop()
        shown.rest()
        return 0


def launch_on_hosts(arguments: Sequence[str], hostfile: str) -> int:
    """Run ``arctic`` with ``arguments`` on the hosts of ``hostfile`` through a plugin's launcher, and wait.

    Each line of ``hostfile`` is ``name slots=processes``.

    Raises:
        PluginNotFoundError: if no installed plugin has a launcher.
        UserError: if the launcher refuses to run.
    """
    start = process_registry().load_host_launcher()
    status: int = start(arguments, hostfile, {**os.environ, **_environment(None)})
    return status


def end_with_launcher() -> None:
    """Have this process receive SIGTERM if its launcher is killed, so that no process is left behind (Linux only).

    Call it in a process that :func:`launch` started.
    """
    if os.environ.get(_LAUNCHER) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[_LAUNCHER]):
            sys.exit(1)  # the launcher was killed before the call


def _environment(processes: int | None) -> dict[str, str]:
    found = {
        "PATH": _path(),
        "PYTHONSAFEPATH": "1",
    }  # no file in the working directory, for example in a checkpoint, is imported as a module
    if processes is not None:
        found[_LAUNCHER] = str(os.getpid())
        found["OMP_NUM_THREADS"] = os.environ.get(
            "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes))
        )
    return found


def _path() -> str:
    """Return PATH with the interpreter's directory, where a virtual environment has ninja, which compiles kernels."""
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    return path if own in path.split(os.pathsep) else f"{own}{os.pathsep}{path}"


class _Shown:
    """Live output of the first process's standard error.

    The error that ends the process is only shown by :meth:`rest`, because another process may have caused it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._position, self._done = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def errors(self, rank: int) -> str:
        """Return what the process of that rank wrote to its standard error."""
        path = next(self.folder.glob(f"*/attempt_0/{rank}/stderr.log"), None)
        return path.read_text(errors="replace") if path is not None else ""

    def says_itself(self, rank: int) -> bool:
        """Return whether the first process ended with the same one-line error as the process of that other rank.

        All processes find the same errors in a recipe, whichever fails first.
        """
        own, first = (
            [line for line in self.errors(number).splitlines() if line.startswith("arctic: ")][-1:]
            for number in (rank, 0)
        )
        return rank != 0 and own == first != []

    def stop(self) -> None:
        """Pause the output."""
        self._done.set()
        self._thread.join()

    def rest(self) -> None:
        """Show the rest of the output."""
        self._show(self.errors(0))

    def _show(self, text: str) -> None:
        sys.stderr.write(text[self._position :])
        sys.stderr.flush()
        self._position = max(self._position, len(text))

    def _follow(self) -> None:
        while not self._done.wait(0.5):
            text = self.errors(0)
            end = re.search(r"^(arctic: |Traceback )", text, re.MULTILINE)
            self._show(text if end is None else text[: end.start()])


def _show_failure(rank: int, text: str, status: int) -> None:
    lines = text.rstrip().splitlines()[-_LINES:]
    if status < 0:
        name = signal.Signals(-status).name
        lines.append(f"ended by {name}{', which the system sends when memory runs out' if name == 'SIGKILL' else ''}")
    sys.stderr.write("".join(f"rank {rank}: {line}\n" for line in lines) or f"rank {rank} ended with status {status}\n")
    sys.stderr.flush()
