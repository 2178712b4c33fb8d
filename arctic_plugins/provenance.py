"""``arctic_plugins.json``, written last into every checkpoint, so that its presence shows that the rest is complete.
It contains the stack, the distributions that provided its plugins, the versions that wrote it, and the size and digest
of every other file. A file that was truncated or changed since is detected before it can result in a wrong model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash
from packaging.version import InvalidVersion, Version

from arctic_plugins.discovery import installed_plugins
from arctic_plugins.errors import CheckpointError, PluginNotFoundError
from arctic_plugins.files import file_within, read_json
from arctic_plugins.host import hosts
from arctic_plugins.registry import FIRST_PARTY

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "Provenance",
    "check_files",
    "check_plugins",
    "digest",
    "read_provenance",
    "stack_sha256",
    "write_provenance",
]

logger = logging.getLogger(__name__)

FILE_NAME = "arctic_plugins.json"
"""The file's name in a checkpoint."""
FORMAT = 1
"""Version of this file and of the checkpoint's encoded weights. A newer one is refused."""

_FREE = (FILE_NAME, "README.md")
"""Files that contain neither weights nor settings nor a tokenizer: anyone may change them."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Provenance:
    """The content of ``arctic_plugins.json``."""

    stack: dict[str, dict[str, Any]]
    """The stack in its canonical form."""
    sha256: str
    """The hex digest of the stack; see :func:`stack_sha256`."""
    versions: dict[str, str] = field(default_factory=dict)
    """Distribution -> version that wrote the checkpoint."""
    plugins: dict[str, str] = field(default_factory=dict)
    """Plugin -> ``distribution==version`` that provided it."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path within the checkpoint -> ``bytes`` and ``xxh3_128`` (hexadecimal)."""
    config: dict[str, Any] = field(default_factory=dict)
    """For an adapter: keys of its base model's config that were changed, such as the labels of a classifier."""
    format: int = FORMAT
    """See :data:`FORMAT`."""


def stack_sha256(stack: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the hex digest of a stack in its canonical form, :meth:`arctic_plugins.stack.Stack.to_dict`."""
    return hashlib.sha256(json.dumps(stack, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_provenance(
    directory: str | Path, stack: Mapping[str, Mapping[str, Any]], *, config: Mapping[str, Any] | None = None
) -> Path:
    """Write what made the checkpoint and which files it consists of. Call it when everything else is on disk.

    The file appears whole or not at all: it is written under another name, flushed to disk, then renamed.

    Args:
        directory: the checkpoint.
        stack: in its canonical form, :meth:`arctic_plugins.stack.Stack.to_dict`.
        config: see :attr:`Provenance.config`.
    """
    path = Path(directory) / FILE_NAME
    providers = installed_plugins()
    plugins = {name: f"{found[0].distribution}=={found[0].version}" for name in stack if (found := providers.get(name))}
    content = {
        "format": FORMAT,
        "stack": dict(stack),
        "sha256": stack_sha256(stack),
        "versions": {name: installed for name in _recorded() if (installed := _version(name))},
        "plugins": dict(sorted(plugins.items())),
        **({"config": dict(config)} if config else {}),
        "files": {
            name: {"bytes": file.stat().st_size, "xxh3_128": digest(file, file.stat().st_size)}
            for name, file in sorted(_files(path.parent))
        },
    }
    draft = path.with_suffix(".json.tmp")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    return path


def read_provenance(directory: str | Path) -> Provenance:
    """Read a checkpoint's ``arctic_plugins.json``.

    Raises:
        CheckpointError: the file is absent (this project did not write the checkpoint, or was interrupted while saving
            it), malformed, or in a newer format.
    """
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {FILE_NAME}",
            expected="a checkpoint that arctic-plugins finished writing",
            fix="use another directory",
        )
    content = read_json(path)
    if type(content.get("format")) is not int or content["format"] < 1:
        raise CheckpointError(
            f"{path} has format {content.get('format')!r}",
            expected="a positive integer",
            fix="save the checkpoint again",
        )
    if content["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}", expected=f"at most {FORMAT}", fix="upgrade arctic-plugins"
        )
    for key in ("stack", "files", "plugins", "versions", "config"):
        if not isinstance(content.get(key, {} if key != "stack" else None), dict):
            raise CheckpointError(
                f"{path} has {key} {content.get(key)!r}", expected="an object", fix="save the checkpoint again"
            )
    records = content.get("files", {}).values()
    if not all(
        isinstance(record, dict) and type(record.get("bytes")) is int and isinstance(record.get("xxh3_128"), str)
        for record in records
    ):
        raise CheckpointError(f"{path} has files without 'bytes' and 'xxh3_128'", fix="save the checkpoint again")
    if not all(isinstance(options, dict) for options in content["stack"].values()):
        raise CheckpointError(
            f"{path} has a stack in which a plugin has no options",
            expected="an object for each plugin",
            fix="save the checkpoint again",
        )
    return Provenance(
        **{key: content[key] for key in Provenance.__dataclass_fields__ if key in content}
        | {"sha256": content.get("sha256", "")}
    )


def check_files(directory: str | Path) -> None:
    """Check that every file listed in the checkpoint's ``arctic_plugins.json`` exists and is unchanged.

    Each file is read once.

    Raises:
        CheckpointError: the message names the file and how it differs.
    """
    for name, record in read_provenance(directory).files.items():
        path = file_within(directory, name, Path(directory) / FILE_NAME)
        again = "copy or download it again, or save the checkpoint again"
        try:
            size = path.stat().st_size
            if size != record["bytes"]:
                raise CheckpointError(
                    f"{path} has {size} bytes",
                    expected=f"the {record['bytes']} that were saved",
                    fix=_or_accept(name, again),
                )
            if digest(path, size) != record["xxh3_128"]:
                raise CheckpointError(f"{path} is not what was saved: its digest differs", fix=_or_accept(name, again))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing", fix=again) from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}", fix=again) from error


def check_plugins(provenance: Provenance) -> None:
    """Check that the plugins that made the checkpoint are installed, and warn once about each that is older.

    The messages name the distributions to install. No command installs what a file names: whoever wrote the file could
    have published it.

    Raises:
        PluginNotFoundError: a plugin is not installed.
    """
    missing = sorted(provenance.stack.keys() - installed_plugins().keys())
    if missing:
        ours = [f"arctic-plugins-{name}" for name in missing if name in FIRST_PARTY]
        others = [
            f"{provenance.plugins.get(name, 'a distribution that it does not name')!r}"
            for name in missing
            if name not in FIRST_PARTY
        ]
        fixes = [f"pip install {' '.join(ours)}"] if ours else []
        if others:
            fixes.append(
                f"according to the checkpoint, it is provided by {', '.join(others)}, which runs as code: install it "
                "only if you know it and trust it"
            )
        plural = "s" if len(missing) > 1 else ""
        raise PluginNotFoundError(
            f"the checkpoint was made with the plugin{plural} {', '.join(missing)}, not installed here",
            fix="; ".join(fixes),
        )
    for distribution, wrote, installed in _older_here(provenance):
        _warn_older(distribution, wrote, installed)


def _older_here(provenance: Provenance) -> list[tuple[str, str, str]]:
    """Return the distributions that are installed in an older version than the one that wrote the checkpoint.

    Returns:
        Distribution, version that wrote the checkpoint, installed version. Only the core and the plugins of the stack
            are compared, and only where the same distribution provides the plugin. Versions that cannot be read are
            ignored: they come from a file.
    """
    providers = installed_plugins()
    recorded = (str(provenance.plugins.get(name)).partition("==") for name in provenance.stack)
    wrote = {name: found for name, _, found in recorded}
    wrote["arctic-plugins"] = str(provenance.versions.get("arctic-plugins"))
    here = {found.distribution: found.version for name in provenance.stack for found in providers.get(name, [])}
    here["arctic-plugins"] = str(_version("arctic-plugins"))
    return [
        (name, wrote[name], here[name])
        for name in sorted(here.keys() & wrote.keys())
        if _is_older(here[name], wrote[name])
    ]


def _is_older(one: str, other: str) -> bool:
    try:
        return Version(one) < Version(other)
    except InvalidVersion:
        return False


@functools.cache
def _warn_older(distribution: str, wrote: str, installed: str) -> None:
    logger.warning(
        "the checkpoint was written by %s %s, and %s is installed here, which may read it differently; pip install "
        "--upgrade '%s>=%s'",
        distribution,
        wrote,
        installed,
        distribution,
        Version(wrote).public,
    )


def _or_accept(name: str, fix: str) -> str:
    if name.endswith((".json", ".jinja", ".txt")):
        return f"{fix}; if you made the change, delete the entry '{name}' under 'files' in {FILE_NAME}"
    return fix


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in _FREE and not path.name.startswith(".") and not name.endswith(".tmp"):
            yield name, path


def digest(path: Path, size: int) -> str:
    """Return the 128-bit XXH3 digest of the first ``size`` bytes.

    It is as fast as memory, and detects damage, not attacks.
    """
    found = xxhash.xxh3_128()
    chunk = memoryview(bytearray(_CHUNK))  # one buffer that stays in the cache: a new one per read takes twice as long
    with path.open("rb", buffering=0) as file:
        while size > 0 and (read := file.readinto(chunk)):  # some special files never end
            found.update(chunk[: min(read, size)])
            size -= read
    return found.hexdigest()


def _recorded() -> dict[str, None]:
    return dict.fromkeys(["arctic-plugins", *(name for host in hosts().values() for name in host.recorded)])


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
