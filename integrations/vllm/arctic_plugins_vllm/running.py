"""An ``arctic serve`` process that runs for the duration of a ``with`` block."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from arctic_plugins.errors import ArcticError

__all__ = ["Server"]

PROCESSES = 3
"""The number of vLLM 0.32's processes: the server, its engine and the engine's worker.

They start one after the other, and each spends most of its startup importing libraries.
"""
PATIENCE = 60.0
"""Seconds in which a server has to stop when it is asked to; then it is killed."""
LAST_WORDS = 200
"""Among how many of the last lines of a log a line of this project's is looked for."""
LAST_LINES = 15
"""How many lines of the log of a server that did not start are shown."""


class Server:
    """A server on a free port of this machine; its startup progress is shown on ``console``, if any.

    The server has a session of its own: it does not get the terminal's Ctrl-C, and is asked to stop when the block
    ends, for whatever reason.

    Args:
        arguments: those of ``arctic serve``, a checkpoint and options, without ``--host`` and ``--port``.
        log: the file for its output.
        timeout: seconds until it has to answer.
        console: shows a progress bar, and the last lines of the log if the server does not start.

    Raises:
        ArcticError: on entering, if the server ended or did not answer in time; the message contains its last line of
            output and names its log.
    """

    process: subprocess.Popen[bytes]
    """The server's first process, once the block is entered."""
    url: str
    """Its address without ``/v1``, once the block is entered."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        timeout: float = 600,
        console: Console | None = None,
    ) -> None:
        self.arguments, self.log, self.timeout = tuple(arguments), log, timeout
        self.console = console or Console(quiet=True)

    def __enter__(self) -> Server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "arctic_plugins.cli", "serve", *self.arguments]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            with Progress(*columns, console=self.console) as bar:
                task = bar.add_task("starting the server", total=PROCESSES)
                self._wait(lambda count: bar.update(task, completed=min(count, PROCESSES) - 1))
                bar.update(task, completed=PROCESSES)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def ended(self) -> ArcticError | None:
        """Return an error with the last line of output if the server ended by itself, after showing the last lines."""
        status = self.process.poll()
        return None if status is None else self._failure(f"the server ended with status {status}")

    def _wait(self, progress: Callable[[int], None]) -> None:
        direct = urllib.request.ProxyHandler({})  # no proxy reaches this machine's loopback
        opener = urllib.request.build_opener(direct)
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if (error := self.ended()) is not None:
                raise error
            try:
                with opener.open(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                progress(_processes(self.process.pid))
                time.sleep(0.5)
        raise self._failure(f"the server did not answer within {self.timeout:.0f} s")

    def _failure(self, what: str) -> ArcticError:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        # What libraries print after the server's own word, while the process ends, does not explain anything.
        told = [at for at, line in enumerate(lines) if line.startswith("arctic: ") and at >= len(lines) - LAST_WORDS]
        lines = lines[: told[-1] + 1 if told else None][-LAST_LINES:]
        for line in lines:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        return ArcticError(f"{what}: {lines[-1] if lines else 'there was no output'}", fix=f"see {self.log}")

    def _stop(self) -> None:
        try:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=PATIENCE)
        finally:  # also after a second Ctrl-C, and for processes that outlive the server
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _processes(pid: int) -> int:
    """Return the number of vLLM's processes, without the trackers that multiprocessing starts with its children."""
    try:
        children = psutil.Process(pid).children(recursive=True)
        return 1 + sum(not any("resource_tracker" in word for word in child.cmdline()) for child in children)
    except psutil.Error:  # a process that ends in the meantime
        return 1
