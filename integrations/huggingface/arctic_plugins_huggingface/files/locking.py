"""A lock that allows only one run at a time in an output directory."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from arctic_plugins.errors import ConfigError
from arctic_plugins.processes import is_first

__all__ = ["LOCK", "in_use_by_us"]

LOCK = ".arctic_plugins.lock"
"""File in an output directory while a run writes to it; it names the run.

What counts is the system's lock on the file, which ends with its process.
"""


@contextmanager
def in_use_by_us(output: Path) -> Iterator[None]:
    """Keep other runs out of ``output`` for the duration of the block; create the directory if it does not exist.

    The first of several processes holds the lock for all.

    Raises:
        ConfigError: another run uses the directory; names its process and host.
    """
    if not is_first():
        yield
        return
    new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    path = output / LOCK
    file = _lock(path)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()
        if new:
            with suppress(OSError):  # it is not empty
                output.rmdir()


def _lock(path: Path) -> IO[str] | None:
    """Return the locked file; None if the system or the file system has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+", encoding="utf-8")
        except OSError as error:  # for example a link, which would redirect the writes to another file
            raise ConfigError(
                f"{path} cannot be opened: {error.strerror}", fix="remove it if no run is using that directory"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            file.close()
            raise ConfigError(
                f"training.output_dir {path.parent} is in use by {owner}",
                fix="wait until that run ends, or choose another directory",
            ) from None
        except OSError:
            file.close()
            return None
        try:
            current = path.stat().st_ino == os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            current = False
        if current:  # and not a file that its owner has removed in the meantime
            break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file
