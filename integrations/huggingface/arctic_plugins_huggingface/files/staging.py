"""Writing a directory completely or not at all, and reporting in one line why it cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from arctic_plugins.errors import ConfigError, UserError

if TYPE_CHECKING:
    pass

__all__ = ["staged", "writing"]


def check_new(directory: str | Path) -> None:
    """Raise :class:`~arctic_plugins.errors.ConfigError` unless ``directory`` is absent or empty.

    This keeps the user's files from being overwritten.
    """
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"{path} exists and is not empty", expected="a new directory", fix="remove it or choose another"
        )


@contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """Yield a directory next to ``directory`` to write to, and rename it to ``directory`` if the block succeeds.

    If the block fails, the new directory is removed.

    Raises:
        ConfigError: ``directory`` exists and is not empty.
        UserError: the disk is full or not writable.
    """
    check_new(directory)
    path = Path(directory)
    draft = path.with_name(f"{path.name}.unfinished")
    with writing(path):
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            if path.exists():
                path.rmdir()
            draft.rename(path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


@contextmanager
def writing(directory: Path, fix: str = "free some space or choose another directory") -> Iterator[None]:
    """Turn the errors that libraries raise for a full or read-only disk into one UserError that names ``directory``.

    safetensors and torch report the cause only in the text of their own errors.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        number = (
            error.errno
            if isinstance(error, OSError)
            else next((code for code in _UNWRITABLE if f"(os error {code})" in text), None)
        )
        if number in _UNWRITABLE:
            raise UserError(f"{directory} cannot be written: {os.strerror(number)}", fix=fix) from error
        if (
            "PytorchStreamWriter failed" in text or "unexpected pos" in text
        ):  # torch/serialization.py, 2.13: torch.save on a full disk
            raise UserError(
                f"{directory} cannot be written: torch.save could not write a complete file", fix=fix
            ) from error
        raise
