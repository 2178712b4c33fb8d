"""URLs of servers, and what of a command line may be recorded."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from urllib.parse import urlsplit, urlunsplit

from arctic_plugins.errors import ConfigError

__all__ = ["base_url", "redacted", "without_password"]

SECRETS = ("--api-key", "--hf-token")
"""Options of vLLM's server whose values are secret."""


def base_url(text: str) -> str:
    """Return the URL of a server without ``/v1``.

    Raises:
        ConfigError: ``text`` is not the URL of an HTTP server.
    """
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises ValueError
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a URL: {error}", expected="for example http://127.0.0.1:8000") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"{text!r} is not the URL of a server", expected="for example http://127.0.0.1:8000")
    return urlunsplit(parts).rstrip("/").removesuffix("/v1").rstrip("/")


def without_password(url: str) -> str:
    """Return ``url`` without a user's name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def redacted(words: Sequence[str]) -> list[str]:
    """Return a command's words without secrets: values of :data:`SECRETS`, and passwords in URLs."""
    found, hide = [], False
    for word in words:
        option, given, _ = word.partition("=")
        secret = option.replace("_", "-") in SECRETS
        if hide and not word.startswith("--"):
            found.append("***")
            continue  # --api-key takes several
        hide = secret and not given
        if secret and given:
            found.append(f"{option}=***")
        elif " " in word:  # the arguments of a server to compare
            found.append(_redacted_text(word))
        else:
            found.append(without_password(word) if "://" in word else word)
    return found


def _redacted_text(text: str) -> str:
    try:
        return shlex.join(redacted(shlex.split(text)))
    except ValueError:
        return text
