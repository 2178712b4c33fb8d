"""Watch what a process does while it reads files from a stranger.

An audit hook reports writes elsewhere, execution of the files' content, and sockets.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

__all__ = ["watched"]

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.truncate",
)
STARTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "os.forkpty", "pty.spawn")
SOCKETS = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "urllib.Request")

_watchers: list[_Watcher] = []
_hooked = False


class _Watcher:
    def __init__(self, hostile: Path, writable: tuple[Path, ...]) -> None:
        self.hostile, self.writable = hostile.resolve(), tuple(path.resolve() for path in writable)
        self.thread, self.seen = threading.get_ident(), []  # type: ignore[var-annotated]

    def look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & WRITES)
            if writes and isinstance(path, (str, bytes)) and not self._may_write(path):
                self.seen.append(f"wrote {os.fsdecode(path)}")
        elif event in CHANGES and isinstance(arguments[0], (str, bytes)) and not self._may_write(arguments[0]):
            self.seen.append(f"{event} {os.fsdecode(arguments[0])}")
        elif event in STARTS or event in SOCKETS:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "exec" and isinstance(arguments[0], CodeType) and self._is_hostile(arguments[0].co_filename):
            self.seen.append(f"executed {arguments[0].co_filename}")
        elif event == "import" and isinstance(arguments[1], str) and self._is_hostile(arguments[1]):
            self.seen.append(f"imported {arguments[1]}")
        elif event == "pickle.find_class":
            self.seen.append(f"unpickled {arguments!r:.200}")

    def _may_write(self, path: str | bytes) -> bool:
        found = Path(os.path.abspath(os.fsdecode(path)))
        return str(found) == os.devnull or any(found.is_relative_to(place) for place in self.writable)

    def _is_hostile(self, path: str) -> bool:
        return os.path.abspath(path).startswith(f"{self.hostile}{os.sep}")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for watcher in _watchers:
        if watcher.thread == threading.get_ident():
            watcher.look(event, arguments)


@contextmanager
def watched(hostile: str | Path, *writable: str | Path) -> Iterator[list[str]]:
    """Watch this thread (``sys.addaudithook``) during the block, which reads files in ``hostile``.

    Yields the list of what the block should not have done: written outside of ``writable``, started a process, used a
    socket, unpickled an object, or executed or imported a file in ``hostile``. Import everything that the block uses
    before entering it.
    """
    global _hooked
    if not _hooked:  # a hook cannot be removed
        sys.addaudithook(_hook)
        _hooked = True
    watcher = _Watcher(Path(hostile), tuple(map(Path, writable)))
    _watchers.append(watcher)
    try:
        yield watcher.seen
    finally:
        _watchers.remove(watcher)
