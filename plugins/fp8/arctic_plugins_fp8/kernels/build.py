"""Builds the CPU kernels in ``csrc`` on first use, once per machine.

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
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from packaging.version import Version

from arctic_plugins import cache_directory

__all__ = ["BuildError", "library", "obstacle"]

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
PORTABLE: dict[str, tuple[str, list[str]]] = {"portable": ("portable.cpp", [])}
X86 = {
    "avx2": ("portable.cpp", ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": ("kernels.cpp", AVX512),
    "avx512_bf16": ("kernels.cpp", [*AVX512, "-mavx512bf16"]),
    "amx": ("kernels.cpp", [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]),
}
INSTRUCTION_SETS: dict[str, tuple[str, list[str]]] = PORTABLE | (X86 if platform.machine() == "x86_64" else {})
"""Instruction set -> source file and compiler flags, for one object file each.

ops.cpp is compiled for any processor of the architecture and chooses at run time, so that different machines can share
a home directory.
"""
TORCH = "-DTORCH_TARGET_VERSION=0x020A000000000000"
"""The oldest torch whose stable ABI contains what ops.cpp uses: 2.10."""
HEADERS = "2.13"
"""The oldest torch whose headers contain it: those of 2.11 lack ``STABLE_TORCH_ERROR_CODE_CHECK``."""


class BuildError(Exception):
    """The kernels could not be built; the message gives the reason in one line."""


@cache
def obstacle() -> str:
    """Return the reason why the kernels cannot be built or run here, or ""."""
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


def library() -> Path:
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
    parts = [path.read_bytes() for path in sorted(SOURCES.iterdir())] + [
        repr((FLAGS, INSTRUCTION_SETS, TORCH, version, torch.__version__)).encode()
    ]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = cache_directory("kernels") / f"fp8-{key}.so"
    if _is_whole(path):
        return path
    with (path.parent / f"fp8-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it when the process ends, however it ends
        if not _is_whole(path):
            logger.info("building the CPU kernels of fp8 (only once)")
            _build(compiler, Path(torch.__file__).parent, path)
    return path


def _is_whole(path: Path) -> bool:
    """Check that the library is the one that :func:`_build` wrote: loading a truncated one can crash the process."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == path.with_suffix(".sha256").read_text()
    except (OSError, ValueError):
        return False


def _build(compiler: str, torch_home: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        out = Path(name)
        commands = [
            [compiler, *FLAGS, "-w", *flags, f"-DISA={isa}", "-c", str(SOURCES / source), "-o", str(out / f"{isa}.o")]
            for isa, (source, flags) in INSTRUCTION_SETS.items()
        ]
        commands.append(
            [
                compiler,
                *FLAGS,
                "-w",
                TORCH,
                f"-I{torch_home / 'include'}",
                "-c",
                str(SOURCES / "ops.cpp"),
                "-o",
                str(out / "ops.o"),
            ]
        )
        objects = [command[-1] for command in commands]
        libraries = [f"-L{torch_home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [
                *pool.map(_run, commands),
                _run([compiler, "-shared", "-o", str(out / "fp8.so"), *objects, *libraries]),
            ]:
                if done.returncode:
                    log = path.with_suffix(".log")
                    log.write_text(f"{' '.join(done.args)}\n{done.stdout}{done.stderr}")
                    raise BuildError(f"{Path(compiler).name} exited with {done.returncode}, see {log}")
        path.with_suffix(".sha256").write_text(hashlib.sha256((out / "fp8.so").read_bytes()).hexdigest())
        os.replace(out / "fp8.so", path)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


@cache
def _compiler() -> str | None:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)
