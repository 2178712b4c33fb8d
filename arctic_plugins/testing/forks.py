"""One interpreter that has imported what is heavy, and forks of it that run tests' programs: the import is paid once."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

__all__ = ["Forks"]


class Forks:
    """Starts a Python that imports ``modules`` with the environment ``environment``; each :meth:`run` is a fork of it.

    What a program changes in its process, its working directory and its limits goes with it. What the modules read from the environment
    when they are imported is the same for all: tests that are about that start another of these, or a process of their own.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment or os.environ),
            start_new_session=True,
        )

    def run(self, program: str | Sequence[Any], *, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run Python source, or the arguments of ``arctic``, in a fork.

        Args:
            program: source, dedented, or arguments, of which paths and numbers become texts.
            cwd: the working directory.
            timeout: seconds, after which all forks are killed and ``subprocess.TimeoutExpired`` is raised.
        """
        source = dedent(program) if isinstance(program, str) else f"from arctic_plugins.cli import main; main({[str(part) for part in program]!r})"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as directory:
            outputs = [Path(directory) / name for name in ("stdout", "stderr")]
            self._process.stdin.write(json.dumps([source, str(cwd or Path.cwd()), *map(str, outputs)]) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                os.killpg(self._process.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(source, timeout)
            answer = self._process.stdout.readline()
            if not answer:
                raise RuntimeError(f"the process that forks ended with status {self._process.wait()}")
            return subprocess.CompletedProcess(source, int(answer), *(path.read_text(encoding="utf-8", errors="replace") for path in outputs))

    def close(self) -> None:
        """End the process; nothing runs in a fork any more."""
        self._process.communicate(timeout=60)


def _serve(modules: Sequence[str]) -> None:
    """Answer each line ``[source, directory, stdout, stderr]`` with the exit status of its fork, negative for a signal."""
    for name in modules:
        import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(_child(*json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _child(source: str, directory: str, *outputs: str) -> int:
    null = os.open(os.devnull, os.O_RDONLY)
    for target, opened in enumerate((null, *(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600) for path in outputs))):
        os.dup2(opened, target)
    os.chdir(directory)
    status = 0
    try:
        exec(compile(source, "<fork>", "exec"), {"__name__": "__main__"})  # noqa: S102 - the test's own program
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:  # as the interpreter does
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status


if __name__ == "__main__":
    _serve(sys.argv[1:])
