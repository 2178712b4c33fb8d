"""Builds a plugin's CPU kernels on first use, once per machine, and puts them behind its operators.

They are compiled with the available C++ compiler, against the headers of the installed torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from arctic_plugins.cache import cache_directory
from arctic_plugins.errors import ConfigError, UserError

__all__ = ["INSTRUCTION_SETS", "BuildError", "CompiledKernels", "obstacle"]

logger = logging.getLogger(__name__)

INCLUDE = Path(__file__).parent / "include"
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-w", f"-I{INCLUDE}"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
INSTRUCTION_SETS: dict[str, tuple[str, list[str]]] = {
    "amx": ("avx512.cpp", [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]),
    "avx512_bf16": ("avx512.cpp", [*AVX512, "-mavx512bf16"]),
    "avx512": ("avx512.cpp", AVX512),
    "avx2": ("portable.cpp", ["-mavx2", "-mfma", "-mf16c"]),
    "portable": ("portable.cpp", []),
}
"""Instruction set, best first -> source file and compiler flags, for one object file each; only the last is not of x86.

``ops.cpp`` is compiled for any processor of the architecture and chooses at run time, so that different machines can
share a home directory.
"""
CAPPED = {"avx2": "avx2", "default": "portable"}
"""The instruction sets of the kernels when ``ATEN_CPU_CAPABILITY`` limits torch."""
TORCH = "-DTORCH_TARGET_VERSION=0x020A000000000000"
"""The oldest torch whose stable ABI contains what operators.h uses: 2.10."""
HEADERS = "2.13"
"""The oldest torch whose headers contain it: those of 2.11 lack ``STABLE_TORCH_ERROR_CODE_CHECK``."""


class BuildError(Exception):
    """The kernels could not be built; the message gives the reason in one line."""


class CompiledKernels:
    """The CPU kernels of a plugin, and the operators ``torch.ops.arctic_NAME`` that they implement.

    Args:
        name: the plugin's name, an identifier.
        variable: an environment variable, by which users select an instruction set instead of the best one of the
            processor, or ``reference`` for none.
        sources: the directory with ``ops.cpp`` and the files of ``instruction_sets``. ``ops.cpp`` defines the operator
            ``use(str instruction_set) -> str``, which chooses an instruction set ("" for the best) and returns its
            name, or "" if the processor does not support it; and implements operators for the dispatch key ``CPU``.
        instruction_sets: keys of :data:`INSTRUCTION_SETS` for which there is a source file; ``portable`` among them.
    """

    def __init__(
        self, name: str, variable: str, sources: Path, instruction_sets: Iterable[str] = tuple(INSTRUCTION_SETS)
    ) -> None:
        self.name = name
        self._variable = variable
        self._sources = sources
        x86 = platform.machine() == "x86_64"
        self._sets = [one for one in instruction_sets if x86 or one == "portable"]
        self._lock = threading.Lock()
        self._first_calls: list[torch.library.Library] = []

    def implement(self, operators: Iterable[str]) -> None:
        """Make the first call of one of these operators on a CPU :meth:`load` the kernels.

        The operators must be defined, and implemented in torch for ``CompositeExplicitAutograd``: this is the
        reference, which is used where there are no kernels.
        """
        library = torch.library.Library(f"arctic_{self.name}", "IMPL", "CPU")
        self._first_calls.append(library)  # what it registers stays as long as it exists (torch 2.13: torch.library)
        for operator in operators:
            library.impl(operator, partial(self._first_call, operator))

    def _first_call(self, operator: str, *args: Any) -> Any:
        self.load()
        return getattr(self._operators, operator)(*args)

    @property
    def _operators(self) -> Any:
        return getattr(torch.ops, f"arctic_{self.name}")

    def load(self) -> str:
        """Load the kernels, building them if necessary.

        Returns:
            The instruction set in use, or "" for the reference.

        Raises:
            ConfigError: the environment variable names an instruction set that the processor does not support.
        """
        with self._lock:
            return self._loaded

    @cached_property
    def _loaded(self) -> str:
        wanted = os.environ.get(self._variable, "")
        self._first_calls.clear()  # unregisters the placeholders
        if wanted == "reference" or obstacle():
            return ""
        try:
            torch.ops.load_library(self.build())
        except (BuildError, UserError, OSError) as error:
            logger.warning(
                "the CPU kernels of %s could not be built or loaded; using slower ones in torch: %s", self.name, error
            )
            return ""
        capped = CAPPED.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), "")
        found: str = self._operators.use(wanted or capped)
        if wanted and not found:
            raise ConfigError(
                f"{self._variable}={wanted}",
                expected="an instruction set that this processor supports",
                fix="unset it",
            )
        return found or str(self._operators.use(""))

    def use(self, instruction_set: str = "") -> str:
        """Choose the kernels by instruction set, or the best ones.

        Returns:
            The instruction set, or "" if it is not available.
        """
        return str(self._operators.use(instruction_set)) if self.load() else ""

    def describe(self) -> tuple[bool, str]:
        """Return whether the kernels are used, and a phrase about them for ``arctic doctor``."""
        if found := self.load():
            return True, f"compiled, {found} instructions"
        return False, f"reference in torch ({obstacle() or f'{self._variable} is set, or the build failed'})"

    def build(self) -> Path:
        """Return the path of the shared library with the kernels, building it if necessary.

        It is built if it does not exist for these sources, this compiler and this torch, or was modified since.

        Raises:
            BuildError: the compiler failed; its output is kept in the directory of the library.
            UserError: there is no directory for the library to which only this user can write.
        """
        compiler = _compiler()
        if compiler is None:
            raise BuildError(obstacle())
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
        files = [*sorted(self._sources.iterdir()), *sorted(INCLUDE.rglob("*.h"))]
        flags = (FLAGS[:-1], [(one, INSTRUCTION_SETS[one]) for one in self._sets], TORCH, version, torch.__version__)
        parts = [path.read_bytes() for path in files] + [repr(flags).encode()]
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        path = cache_directory("kernels") / f"{self.name}-{key}.so"
        if _is_whole(path):
            return path
        with (path.parent / f"{path.stem}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it when the process ends, however it ends
            if not _is_whole(path):
                logger.info("building the CPU kernels of %s (only once)", self.name)
                self._build(compiler, path)
        return path

    def _build(self, compiler: str, path: Path) -> None:
        torch_home = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=path.parent) as name:
            out = Path(name)
            sources = {one: (file, [*flags, f"-DISA={one}"]) for one, (file, flags) in INSTRUCTION_SETS.items()}
            # For any processor: the same numbers on all of them, whether or not there are fused multiply-adds.
            sources["ops"] = ("ops.cpp", ["-ffp-contract=off", TORCH, f"-I{torch_home / 'include'}"])
            commands = [
                [compiler, *FLAGS, *sources[one][1], "-c", str(self._sources / sources[one][0]), "-o", f"{out / one}.o"]
                for one in (*self._sets, "ops")
            ]
            objects = [command[-1] for command in commands]
            libraries = [f"-L{torch_home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
            made = out / "library.so"
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for done in [
                    *pool.map(_run, commands),
                    _run([compiler, "-shared", "-o", str(made), *objects, *libraries]),
                ]:
                    if done.returncode:
                        log = path.with_suffix(".log")
                        log.write_text(f"{' '.join(done.args)}\n{done.stdout}{done.stderr}")
                        raise BuildError(f"{Path(compiler).name} exited with {done.returncode}, see {log}")
            path.with_suffix(".sha256").write_text(hashlib.sha256(made.read_bytes()).hexdigest())
            os.replace(made, path)


@cache
def obstacle() -> str:
    """Return the reason why kernels cannot be built or run here, or ""."""
    if sys.platform != "linux" or sys.byteorder != "little":
        return (
            f"the compiled kernels support only Linux on little-endian processors, and this is {sys.platform} on "
            f"{platform.machine()}"
        )
    if Version(torch.__version__).release < Version(HEADERS).release:
        return f"torch {torch.__version__}, and the compiled kernels need {HEADERS}"
    if _compiler() is None:
        return "no C++ compiler: install g++ or clang++, or set CXX"
    return ""


def _is_whole(path: Path) -> bool:
    """Check that the library is the one that was built: loading a truncated one can crash the process."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == path.with_suffix(".sha256").read_text()
    except (OSError, ValueError):
        return False


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


@cache
def _compiler() -> str | None:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)
