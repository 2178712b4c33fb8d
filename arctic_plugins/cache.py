"""The user's cache directory.

It contains files that can be created again, and that are trusted when they are found: compiled kernels, the demo's
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

from arctic_plugins.errors import UserError

__all__ = ["cache_directory"]

logger = logging.getLogger(__name__)


def cache_directory(name: str) -> Path:
    """Return ``arctic_plugins/NAME`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, created if absent, for this user alone.

    If there is no home directory (as in some containers), if it is not writable, or if other users could write to it,
    return a directory of this user within the system's temporary directory.

    Raises:
        UserError: there is no directory that only this user can write to.
    """
    found = []
    for place in _places():
        try:
            for path in (place, place / name):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_own(path)
            if not os.access(place / name, os.W_OK | os.X_OK):
                raise OSError(f"{place / name} is not writable")
        except OSError as error:
            found.append(str(error))
            _tell(str(error))
            continue
        return place / name
    raise UserError(
        f"no directory can be used as a cache: {'; '.join(found)}",
        fix="set XDG_CACHE_HOME to a directory that only you can write to",
    )


def _places() -> Iterator[Path]:
    import platformdirs

    with contextlib.suppress(RuntimeError):  # neither HOME nor a passwd entry for the user
        own = platformdirs.user_cache_path("arctic_plugins", appauthor=False)
        if own.is_absolute():  # earlier versions give "~/.cache" then
            yield own
    yield Path(tempfile.gettempdir()) / f"arctic_plugins-{_user()}"


def _check_own(path: Path) -> None:
    """Raise OSError unless ``path`` is a directory that belongs to this user and that nobody else can write to.

    If ``path`` is a link, the link must belong to this user as well.
    """
    link, found = path.lstat(), path.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{path} is not a directory")
    if {link.st_uid, found.st_uid} != {_user()}:
        raise OSError(f"{path} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{path} is writable by other users (chmod go-w {path})")


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


@cache
def _tell(reason: str) -> None:
    logger.warning("not used as a cache: %s", reason)
