"""Errors whose one-line messages state what was found, what was expected and how to fix it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Self

__all__ = [
    "ArcticDeprecationWarning",
    "ArcticError",
    "CheckpointError",
    "ClaimError",
    "CodecError",
    "ConfigError",
    "DataError",
    "Diverged",
    "HostVersionError",
    "Interrupted",
    "PluginError",
    "PluginLoadError",
    "PluginNotFoundError",
    "ResolveError",
    "UserError",
    "named",
    "one_line",
    "suggest",
]


class ArcticError(Exception):
    """Base class of all errors that this project raises on purpose.

    Args:
        found: what is wrong; names the file, key, plugin or module.
        expected: what would have been right; may be empty if ``found`` makes it clear.
        fix: what the user can do.
    """

    exit_status = 1
    """The exit status of the command line."""

    def __init__(self, found: str, *, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        parts = [found, f"expected {expected}" if expected else "", fix]
        super().__init__("; ".join(_one_line(part) for part in parts if part))

    def at(self, name: str) -> Self:
        """Return the same error with ``name``, the thing it concerns, in front of its message."""
        return type(self)(f"{name}: {self.found}", expected=self.expected, fix=self.fix)


LONGEST = 1000
"""Maximum number of characters in one part of a message: text that comes from a file may be of any length."""


def _one_line(text: str) -> str:
    """Return ``text`` in one line without terminal control characters, shortened if it is very long."""
    line = " ".join(text.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} [...] {line[-LONGEST // 2 :]}"
    return (
        line
        if line.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    )


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, with its type if the message alone would not be clear."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, (OSError, ValueError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'}"


@contextmanager
def named(name: str, *kinds: type[ArcticError]) -> Iterator[None]:
    """Put ``name`` in front of the messages of errors of these ``kinds``."""
    try:
        yield
    except kinds as error:
        raise error.at(name) from error


class ArcticDeprecationWarning(DeprecationWarning):
    """A use of something that the next minor release of this project removes from the contract.

    The message names it, the release that deprecated it and what replaces it; the warning's location is the plugin's
    code. ``docs/contract.md`` describes how to deprecate something.
    """


class UserError(ArcticError):
    """An error in the user's input, not in the program: the command line exits with status 2."""

    exit_status = 2


class ConfigError(UserError):
    """A bad key or value in a recipe, in a plugin's options or in a command's arguments."""


class DataError(UserError):
    """A data file that is absent, malformed or lacks what its format requires."""


class CheckpointError(UserError):
    """A checkpoint that is absent, incomplete, damaged or in a newer format."""


class PluginError(UserError):
    """A plugin that breaks the contract; the message names the plugin, its distribution or the hook."""


class PluginNotFoundError(PluginError):
    """A requested plugin that no installed distribution provides."""


class PluginLoadError(PluginError):
    """An enabled plugin that is installed but cannot be imported, is not a valid plugin or needs another contract."""


class ResolveError(UserError):
    """Enabled plugins that do not form a stack: an unmet requirement, a conflict, a cycle, or a slot filled twice."""


class ClaimError(UserError):
    """A module that two plugins claim in an exclusive slot, or a claim that cannot be met."""


class HostVersionError(UserError):
    """An installed host library outside the range that a plugin or an integration declares."""


class CodecError(ArcticError):
    """A weight that cannot be encoded, or encoded buffers that do not have their codec's layout."""

    exit_status = 2


class Diverged(ArcticError):  # noqa: N818 - names what happened, not what was wrong
    """A loss or gradient that is NaN or infinite: further training would spoil the weights."""


class Interrupted(ArcticError):  # noqa: N818 - nothing went wrong
    """A run that the user stopped, and that saved what it had done."""

    exit_status = 130


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for a close match among ``known``, otherwise a list of what is available."""
    names = sorted(known)
    if close := get_close_matches(name, names, n=1):
        return f"did you mean '{close[0]}'?"
    return f"available: {', '.join(names)}" if names else "none is available"
