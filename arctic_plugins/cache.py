"""Where this user's process keeps what it can make again, and trusts when it finds it: compiled kernels, the demo's
model, offloaded weights.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import platformdirs

from arctic_plugins.errors import UserError

__all__ = ["cache_directory"]

logger = logging.getLogger(__name__)


def cache_directory(name: str) -> Path:
    """``arctic_plugins/NAME`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, made if it is not there, for this user alone.

    Where there is no home, as in some containers, where it cannot be written, or where others could put something into
    it: a directory of this user in the system's temporary one.

    Raises:
        UserError: there is none that only this user can write to.
    """
    found = []
    for place in _places():
        try:
            for path in (place, place / name):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_own(path)
            if not os.access(place / name, os.W_OK | os.X_OK):
                raise OSError(f"{place / name} cannot be written")
        except OSError as error:
            found.append(str(error))
            _tell(str(error))
            continue
        return place / name
    raise UserError(
        f"there is no place for a cache: {'; '.join(found)}",
        fix="set XDG_CACHE_HOME to a directory that only you can write to",
    )


def _places() -> Iterator[Path]:
    with contextlib.suppress(RuntimeError):  # neither HOME nor an entry for the user
        own = platformdirs.user_cache_path("arctic_plugins", appauthor=False)
        if own.is_absolute():  # earlier versions give "~/.cache" then
            yield own
    yield Path(tempfile.gettempdir()) / f"arctic_plugins-{_user()}"


def _check_own(path: Path) -> None:
    """Raise OSError unless ``path`` is a directory of this user, which nobody else can write to; a link to one must be
    this user's, too.
    """
    link, found = path.lstat(), path.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{path} is not a directory")
    if {link.st_uid, found.st_uid} != {_user()}:
        raise OSError(f"{path} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{path} can be written by others (chmod go-w {path})")


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


@cache
def _tell(reason: str) -> None:
    logger.warning("not used as a cache: %s", reason)
