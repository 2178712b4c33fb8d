"""Run the programs of tests in forks of one interpreter, so that heavy imports are paid for only once."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Fork", "Forks", "engines", "trainers"]

SHOWN = 8000
"""Number of trailing characters of each output that a failure shows."""
GRACE = 5
"""Seconds that the other processes have to exit on their own after one has failed, and again after SIGTERM."""


def check(done: subprocess.CompletedProcess[str], status: int | None) -> subprocess.CompletedProcess[str]:
    """Return ``done`` if its exit status is ``status`` (None accepts any).

    Raises:
        AssertionError: the status differs; the message shows the ends of both outputs.
    """
    if status is not None and done.returncode != status:
        command = textwrap.shorten(shlex.join(map(str, done.args)), 300)
        raise AssertionError(
            f"{command} ended with status {done.returncode}; expected {status}\n{_ends(done.stdout, done.stderr)}"
        )
    return done


@contextlib.contextmanager
def outputs_noted() -> Iterator[None]:
    """Add the ends of both outputs as a note to a ``subprocess.TimeoutExpired`` of the block."""
    try:
        yield
    except subprocess.TimeoutExpired as error:
        error.add_note(_ends(error.stdout, error.stderr))
        raise


def _ends(output: str | bytes | None, error: str | bytes | None) -> str:
    """Return the ends of the outputs of a program that failed."""
    parts = []
    for name, text in (("output", output), ("error", error)):
        text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
        parts.append(f"--- standard {name}{', its end' if len(text) > SHOWN else ''}:\n{text[-SHOWN:]}")
    return "\n".join(parts)


class Fork:
    """A running program in one or several processes, with their combined outputs.

    Attributes:
        pids: process ids in the order of ranks; each process leads a process group.
        returncode: None while the program runs; afterwards as in ``subprocess.Popen``, for the first process that
            failed.
    """

    def __init__(self, request: Mapping[str, Any], address: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fork-")
        self._outputs = [Path(self._directory.name) / name for name in ("stdout", "stderr")]
        self._program = request["arguments"]
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        self._lines = self._connection.makefile("rw", encoding="utf-8")
        self._lines.write(json.dumps({**request, "outputs": list(map(str, self._outputs))}) + "\n")
        self._lines.flush()
        self.pids: list[int] = self._read()
        self.returncode: int | None = None

    def _read(self) -> Any:
        line = self._lines.readline()
        if not line:
            raise RuntimeError(f"the process that forks has ended; it was asked to run {self._program}")
        return json.loads(line)

    @property
    def pid(self) -> int:
        """Process id of the first process."""
        return self.pids[0]

    def poll(self) -> int | None:
        """Return the status, or None while one of the processes is running."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = self._read()
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Wait for all processes and return the status.

        Raises:
            subprocess.TimeoutExpired: after ``timeout`` seconds, once all processes have been killed.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                self._connection.close()
                self._lines.close()
                raise subprocess.TimeoutExpired(
                    self._program, timeout, *(path.read_bytes()[-SHOWN:] for path in self._outputs)
                )
            self.returncode = self._read()
        return self.returncode

    def texts(self) -> tuple[str, str]:
        """Return standard output and standard error so far."""
        output, error = (
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in self._outputs
        )
        return output, error

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for all processes and return standard output and standard error."""
        self.wait(timeout)
        return self.texts()

    def send_signal(self, number: int) -> None:
        """Send a signal to the first process."""
        os.kill(self.pid, number)


class Forks:
    """A Python process that imports ``modules`` in the environment ``environment``; each :meth:`run` is a fork of it.

    Whatever a program changes in its process, working directory and limits ends with the fork. A module sees the
    variables of the fork's environment that it reads when it is used, but not those that it reads when it is imported:
    tests that depend on the latter create another instance, or a separate process. A fork does not run the
    interpreter's exit handlers. ``OMP_NUM_THREADS`` takes effect. The process is closed when this interpreter exits, if
    not before.

    Args:
        modules: names of modules; those that are not installed are skipped.
        environment: variables for the imports, in addition to those of this process.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="forks-")
        self._address = str(Path(self._directory.name) / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._address)
            listener.listen(64)
            # An additional thread of the process that forks would be missing in its forks, while its locks stay held.
            settings = {
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "TORCH_WARM_POOL": "0",
            }
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import _begin; _begin()", str(listener.fileno()), *modules],
                stdin=subprocess.PIPE,
                env={**os.environ, **(environment or {}), **settings},
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        atexit.register(self.close)

    @classmethod
    def _at(cls, address: str) -> Forks:
        """Return an object for the process at ``address``, which another process has started, and will close."""
        self = cls.__new__(cls)
        self._address, self._process = address, None
        return self

    def start(
        self,
        arguments: Sequence[Any],
        *,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
    ) -> Fork:
        """Run ``python ARGUMENT ...`` in forks.

        Args:
            arguments: arguments of Python: ``[script, ...]``, ``["-m", module, ...]`` or ``["-c", source, ...]``; they
                are converted to strings.
            processes: number of processes; several of them have the variables that ``torchrun`` sets and, as with
                ``torchrun``, all end if one fails.
            environment: variables in addition to those of this process.
            cwd: the working directory; by default, that of this process.
        """
        request = {
            "arguments": list(map(str, arguments)),
            "processes": processes,
            "environment": {**os.environ, **(environment or {})},
            "directory": str(Path(cwd or ".").absolute()),
        }
        return Fork(request, self._address)

    def run(
        self,
        arguments: Sequence[Any],
        *,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        timeout: float = 300,
        status: int | None = 0,
    ) -> subprocess.CompletedProcess[str]:
        """Call :meth:`start`, wait, and return the status and the outputs.

        Raises:
            AssertionError: the exit status is not ``status`` (None accepts any).
            subprocess.TimeoutExpired: after ``timeout`` seconds, once all processes have been killed.
        """
        fork = self.start(arguments, processes=processes, environment=environment, cwd=cwd)
        with outputs_noted():
            output, error = fork.communicate(timeout)
        return check(subprocess.CompletedProcess(fork._program, fork.wait(), output, error), status)

    def arctic(self, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        """Call :meth:`run` for the command ``arctic``."""
        return self.run(["-m", "arctic_plugins.cli", *arguments], **options)

    def close(self) -> None:
        """End the process; nothing can be started afterwards. Idempotent."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._directory.cleanup()


@cache
def trainers() -> Forks:
    """Return the :class:`Forks` whose process has imported what a training run needs.

    There is only one, which a test that runs other tests shares with these.
    """
    return _shared(
        "TRAINERS",
        [
            "arctic_plugins_huggingface.training.run",
            "arctic_plugins_huggingface.checkpoints.merge",
            "arctic_plugins_huggingface.generate",
            "transformers.models.llama.modeling_llama",
            "deepspeed",
        ],
    )


@cache
def engines() -> Forks:
    """Return the :class:`Forks` whose process has imported vLLM; there is only one, as with :func:`trainers`."""
    return _shared(
        "ENGINES",
        [
            "vllm.entrypoints.llm",
            "vllm.v1.worker.cpu_worker",
            "vllm.v1.core.sched.scheduler",
            "vllm.v1.attention.backends.cpu_attn",
            "vllm.model_executor.layers.quantization.online.base",
            "arctic_plugins_vllm.quantization",
            "arctic_plugins_huggingface.checkpoints.save",
        ],
    )


def _shared(name: str, modules: Sequence[str]) -> Forks:
    """Return the forks that the process above this one has started under ``name``, or new ones for those below."""
    variable = f"ARCTIC_PLUGINS_{name}"
    if address := os.environ.get(variable):
        return Forks._at(address)
    forks = Forks(modules)
    os.environ[variable] = forks._address
    return forks


# The code that runs in the process that forks, and in the forks.


def _begin() -> None:
    """Import the modules, then fork for each connection until standard input is closed."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        with contextlib.suppress(ImportError):
            import_module(module)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if listener not in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with contextlib.suppress(BrokenPipeError):
                _supervise(connection)
            os._exit(0)
        connection.close()


def _supervise(connection: socket.socket) -> None:
    """Start the processes, send their ids, wait, and send the status; kill them if the connection is closed."""
    lines = connection.makefile("rw", encoding="utf-8")
    request = json.loads(lines.readline())
    count = request.pop("processes")
    if count > 1:
        shared = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
        }
        request["environment"] |= {name: str(value) for name, value in shared.items()}
    pids = []
    for rank in range(count):
        pid = os.fork()
        if not pid:
            connection.detach()
            lines.detach()
            if count > 1:
                request["environment"] |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os._exit(_child(**request))
        pids.append(pid)
    lines.write(json.dumps(pids) + "\n")
    lines.flush()
    running = {os.pidfd_open(pid): pid for pid in pids}
    status = 0
    limits: list[float] = []
    while running:
        left = max(0.0, limits[0] - time.monotonic()) if limits else None
        ready, _, _ = select.select([connection.fileno(), *running], [], [], left)
        if connection.fileno() in ready:
            _signal(running.values(), signal.SIGKILL)
            return
        if limits and not ready:
            _signal(running.values(), signal.SIGTERM if len(limits) > 1 else signal.SIGKILL)
            limits = limits[1:] or [time.monotonic() + GRACE]
        for descriptor in ready:
            found = os.waitstatus_to_exitcode(os.waitpid(running.pop(descriptor), 0)[1])
            os.close(descriptor)
            if found and not status:
                status, limits = found, [time.monotonic() + GRACE, time.monotonic() + 2 * GRACE]
    lines.write(json.dumps(status) + "\n")
    lines.flush()


def _signal(pids: Any, number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def _free_port() -> int:
    """Return a free port below those that the system assigns (``ip_local_port_range``), so that it stays free."""
    port = 10_000 + os.getpid() % 20_000
    while True:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                port = 10_000 + (port - 9_999) % 20_000
            else:
                return port


def _child(arguments: list[str], environment: dict[str, str], directory: str, outputs: list[str]) -> int:
    """Run the program as the interpreter would, and return the exit status."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for target, opened in enumerate(
        (null, *(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for path in outputs))
    ):
        os.dup2(opened, target)
    os.chdir(directory)
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    kind, rest = (arguments[0], arguments[1:]) if arguments[0] in ("-m", "-c") else ("", arguments)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = str(Path(rest[0]).parent.absolute()) if not kind else directory
    sys.path[:] = [first, *paths, *(path for path in sys.path[1:] if path not in before)]
    sys.argv = [kind or rest[0], *rest[1:]]
    if "PYTHONFAULTHANDLER" in environment:
        import faulthandler

        faulthandler.enable()
    if "torch" in sys.modules and environment.get("OMP_NUM_THREADS"):
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    status = 0
    try:
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = ModuleType("__main__")
            if not kind:
                main.__file__ = rest[0]
            exec(  # noqa: S102
                compile(rest[0] if kind else Path(rest[0]).read_bytes(), "<string>" if kind else rest[0], "exec"),
                main.__dict__,
            )
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = 130
    except BaseException:  # like the interpreter
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):
            stream.flush()
    return status & 0xFF
