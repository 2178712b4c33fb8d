"""Every error that a user can cause says, in one line, what was found, what was expected and how to fix it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Self

__all__ = [
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
    """Base of all errors raised on purpose.

    Args:
        found: what is wrong, naming the file, key, plugin or module.
        expected: what would have been right; may be empty when ``found`` says it.
        fix: what the user can do.
    """

    exit_status = 1

    def __init__(self, found: str, *, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        parts = [found, f"expected {expected}" if expected else "", fix]
        super().__init__("; ".join(_one_line(part) for part in parts if part))

    def at(self, name: str) -> Self:
        """The same error, with what it is about before it."""
        return type(self)(f"{name}: {self.found}", expected=self.expected, fix=self.fix)


LONGEST = 1000
"""Characters of a part of a message: what a file holds may be any number of them."""


def _one_line(text: str) -> str:
    """``text`` in one line that no terminal takes for a command, cut where it is very long."""
    line = " ".join(text.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} [...] {line[-LONGEST // 2 :]}"
    return (
        line
        if line.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    )


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, with its type where the message alone would not be understood."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, (OSError, ValueError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'}"


@contextmanager
def named(name: str, *kinds: type[ArcticError]) -> Iterator[None]:
    """Put ``name`` before the text of errors of these ``kinds``."""
    try:
        yield
    except kinds as error:
        raise error.at(name) from error


class UserError(ArcticError):
    """The input is at fault, not the program: the command line exits with status 2."""

    exit_status = 2


class ConfigError(UserError):
    """A recipe, a plugin's options or a command's arguments hold a bad key or value."""


class DataError(UserError):
    """A data file is absent, malformed or lacks what its format needs."""


class CheckpointError(UserError):
    """A checkpoint is absent, incomplete, damaged or of a newer format."""


class PluginError(UserError):
    """A plugin breaks the contract; the message names the plugin, its distribution or the hook."""


class PluginNotFoundError(PluginError):
    """No installed distribution provides the plugin that was asked for."""


class PluginLoadError(PluginError):
    """An enabled plugin is installed but cannot be imported or is not a valid plugin."""


class ResolveError(UserError):
    """The enabled plugins do not make a stack: unmet requirement, conflict, cycle, or a slot filled twice."""


class ClaimError(UserError):
    """Two plugins claim one module in an exclusive slot, or a claim cannot be met."""


class HostVersionError(UserError):
    """An installed host library is outside the range that a plugin declares."""


class CodecError(ArcticError):
    """A weight cannot be encoded, or encoded buffers do not have the layout that their codec gives."""

    exit_status = 2


class Diverged(ArcticError):  # noqa: N818 - what happened, not what was wrong
    """A loss or gradient is NaN or infinite: training on would spoil the weights."""


class Interrupted(ArcticError):  # noqa: N818 - nothing went wrong
    """The user stopped a run, which saved what it had done."""

    exit_status = 130


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for a close match among ``known``, otherwise the list of what is available."""
    names = sorted(known)
    if close := get_close_matches(name, names, n=1):
        return f"did you mean '{close[0]}'?"
    return f"available: {', '.join(names)}" if names else "none is available"
