"""An ``arctic serve`` process that runs for the duration of a ``with`` block."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from arctic_plugins_huggingface.generate import chat
from arctic_plugins_huggingface.training import progress_bar
from rich.console import Console

from arctic_plugins.errors import ArcticError

__all__ = ["Server"]


PROCESSES = 3
"""The number of vLLM 0.32's processes: the server, its engine and the engine's worker.

They start one after the other, and each spends most of its startup importing libraries.
"""


class Server:
    """A server for ``checkpoint`` on a free port of this machine; its startup progress is shown on ``console``, if any.

    Raises:
        ArcticError: if the server ended or did not answer within ``timeout`` seconds; the message contains its last
            line of output and names its log.
    """

    def __init__(
        self,
        checkpoint: Path,
        log: Path,
        *,
        options: tuple[str, ...] = (),
        timeout: float = 600,
        console: Console | None = None,
    ) -> None:
        self.checkpoint, self.log, self.timeout, self.console = checkpoint, log, timeout, console or Console(quiet=True)
        self.port = _free_port()
        command = [
            sys.executable,
            "-m",
            "arctic_plugins.cli",
            "serve",
            str(checkpoint),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            *options,
        ]
        with log.open("w") as output:  # a session of its own, so that the engine's processes end with it
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> Server:
        try:
            with progress_bar(self.console) as bar:
                task = bar.add_task("starting the server", total=PROCESSES, figures="")
                self._wait(lambda: bar.update(task, completed=min(self._processes(), PROCESSES) - 1))
                bar.update(task, completed=PROCESSES)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def chat(
        self, question: str, *, max_tokens: int, system: str | None = None, model: str | None = None
    ) -> tuple[str, list[int]]:
        """Ask a question with greedy decoding, and return the answer's text and token ids."""
        body = {
            "model": model or str(self.checkpoint),
            "messages": chat(question, system),
            "temperature": 0,
            "max_tokens": max_tokens,
            "return_token_ids": True,
        }
        choice = self._request("/v1/chat/completions", body)["choices"][0]
        return choice["message"]["content"], choice["token_ids"]

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as response:  # noqa: S310
            return json.load(response)

    def _wait(self, still: Callable[[], None]) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ArcticError(f"the server ended: {self._last_line()}", fix=f"see {self.log}")
            try:
                self._request("/v1/models")
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                still()
                time.sleep(0.5)
            else:
                return
        raise ArcticError(
            f"the server did not answer within {self.timeout:.0f} s: {self._last_line()}", fix=f"see {self.log}"
        )

    def _processes(self) -> int:
        """Return the number of vLLM's processes, without the trackers that multiprocessing starts with its children."""
        try:
            children = psutil.Process(self._process.pid).children(recursive=True)
            return 1 + sum(not any("resource_tracker" in word for word in child.cmdline()) for child in children)
        except psutil.Error:  # a process that ends in the meantime
            return 1

    def _last_line(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "there was no output"

    def _stop(self) -> None:
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, signal_number)
                self._process.wait(timeout=30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
