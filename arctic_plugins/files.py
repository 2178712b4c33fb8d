"""Files of a checkpoint, which may be a stranger's: what one names is opened only within it, and what one says is
bounded by what is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from arctic_plugins.errors import CheckpointError, PluginError
from arctic_plugins.host import GROUP, hosts

__all__ = ["check_directory", "check_elements", "check_keys", "check_sizes", "copy_files", "file_within", "read_json"]

LONGEST_JSON = 256 << 20
"""Bytes; a tokenizer of 256,000 entries takes 33 MB."""
LONGEST_HEADER = 100 << 20
"""Bytes of a safetensors file's header, as in the library."""
LONGEST_NAME = 255
"""Bytes of a file's name, as file systems have it."""
LAYERS = re.compile(r"(^|_)(n_)?(layers?|depths?)$")
"""Keys of a ``config.json`` that say how many layers are built: ``num_hidden_layers``, ``n_layer``, ``decoder_layers``
and so on.
"""
EXPERTS = re.compile(r"(^|_)experts$")
FEW = 1000
"""Layers or experts that cost next to nothing, whatever files hold: some models use a layer's weights several times."""
FEW_ELEMENTS = 1 << 26
"""Of a model's tensors, whatever files hold: tables of positions and the like are not saved."""
ELEMENTS_PER_BYTE = 8
"""No format is denser than a bit for each weight."""


def file_within(directory: str | Path, name: Any, where: str | Path) -> Path:
    """The file of ``directory`` that ``where`` names: it may be absent, or a link to another file, as in the hub's
    cache.

    Raises:
        CheckpointError: ``name`` is not a relative path that stays in ``directory``, or there is something else than a
            file: a device would be read for ever.
    """
    if not isinstance(name, str) or not _is_relative(name):
        raise CheckpointError(
            f"{where} names {name!r}",
            expected="a file of its own directory",
            fix="do not use this checkpoint, or make it again",
        )
    path = Path(directory) / name
    check_regular(path)
    return path


def _is_relative(name: str) -> bool:
    """Whether ``name`` is one of a file in or below the directory, on any file system."""
    path = PurePosixPath(name)
    try:
        fits = all(len(os.fsencode(part)) <= LONGEST_NAME for part in path.parts) and len(name) < 4096
    except UnicodeEncodeError:  # half of a pair of UTF-16
        return False
    return bool(name) and fits and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def copy_files(source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    """Copy the files of the directory ``source`` whose names are ``wanted`` to the directory ``target``, with what is
    behind links.

    Raises:
        CheckpointError: a link leads out of ``source``, as one in an unpacked archive may do, to a file that was never
            to be published.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and wanted(path.name):
            if not _is_own(path):
                found = f"{path} is a link to {path.resolve()}"
                raise CheckpointError(
                    found,
                    expected="a file of the checkpoint",
                    fix="put a copy in its place, if it belongs there, or remove it",
                )
            shutil.copyfile(path, target / path.name)


def _is_own(path: Path) -> bool:
    """Whether the file lies in its directory, or in the hub's cache, where snapshots link to it."""
    found, directory = path.resolve(), path.parent.resolve()
    if found.is_relative_to(directory):
        return True
    snapshots = next((parent for parent in directory.parents if parent.name == "snapshots"), None)
    return snapshots is not None and found.is_relative_to(snapshots.parent / "blobs")


def check_regular(path: Path) -> None:
    """Raise CheckpointError if ``path`` is there and no file."""
    try:
        mode = path.stat().st_mode
    except OSError:  # absent, or unreadable, as opening it will say
        return
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            f"{path} is not a regular file",
            expected="a file of the checkpoint",
            fix="copy or download the checkpoint again",
        )


def check_directory(directory: Path) -> None:
    """Raise CheckpointError if a checkpoint's directory holds a device or a pipe: a host that looks for a file of its
    name would read it for ever.
    """
    for path in sorted(directory.glob("*")) + sorted(directory.glob("additional_chat_templates/*")):
        if not path.is_dir():
            check_regular(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a checkpoint's JSON file whose top level is an object.

    Raises:
        CheckpointError: absent, unreadable, malformed (with line and column), not a regular file, or not an object.
    """
    check_regular(path)
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes", expected=f"at most {LONGEST_JSON}", fix="copy it again"
            )
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\ud" in text.lower():  # half of a pair of UTF-16 cannot be written again, nor be a file's name
            json.dumps(content, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", fix="the checkpoint is incomplete: make it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(
            f"{path} is not valid JSON: {error}", fix="copy it again, or save the checkpoint again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds {type(content).__name__}",
            expected="an object",
            fix="copy it again, or save the checkpoint again",
        )
    return content


def check_keys(config: Mapping[str, Any], where: str | Path) -> None:
    """Check that a ``config.json`` names nothing else to load: neither kernels of a hub, nor other files, nor another
    model. The hosts that are installed say which of its keys would.

    Raises:
        CheckpointError: names the key.
        PluginError: no installed distribution describes a host, so that nobody can say.
    """
    known = hosts().values()
    if not known:
        raise PluginError(
            f"{where} cannot be checked: no installed distribution describes a host",
            expected=f"an integration with an entry point in {GROUP}",
            fix="install the integration again",
        )
    elsewhere = frozenset[str]().union(*(host.refused_keys for host in known))
    code = frozenset[str]().union(*(host.hub_code_keys for host in known))
    for key, value in _items(config):
        if (key in elsewhere and value is not None) or (str(key).strip("_") in code and "/" in str(value)):
            found = f"{where} has {key} {value!r}"
            raise CheckpointError(
                found, expected="a model in this directory alone", fix=f"remove '{key}', if you trust the rest"
            )


def check_sizes(config: Mapping[str, Any], weights: Iterable[Path], where: str | Path) -> None:
    """Check that ``config`` speaks of no more layers than its files have tensors, and of no more experts than they have
    bytes: hosts build what it says, one after the other.

    Args:
        config: content of a ``config.json``, nested configs included.
        weights: its safetensors files, whose headers are read where there are more than :data:`FEW` layers or experts;
            none, if they are not here.
        where: the file, for messages.

    Raises:
        CheckpointError: names the key.
    """
    many = [
        (key, value)
        for key, value in _items(config)
        if isinstance(value, (int, float))
        and not value <= FEW
        and (LAYERS.search(str(key)) or EXPERTS.search(str(key)))
    ]
    tensors, size = _tensor_counts(weights) if many else (0, 0)
    for key, value in many:
        if not value <= (tensors if LAYERS.search(str(key)) else size):
            found = f"{where} has {key} {value}"
            raise CheckpointError(
                found,
                expected=f"no more than its files hold ({tensors} tensors)",
                fix="config.json is of another model",
            )


def check_elements(elements: int, weights: Iterable[Path], where: str | Path) -> None:
    """Check that a model has no more ``elements`` than its files can hold: hosts take memory for what a file lacks
    before they say so.

    Raises:
        CheckpointError: the files have too few bytes.
    """
    size = sum(path.stat().st_size for path in weights)
    if elements > max(FEW_ELEMENTS, ELEMENTS_PER_BYTE * size):
        found = f"{where} describes a model of {elements} elements, and its files have {size} bytes"
        raise CheckpointError(
            found,
            expected="a config.json that fits them",
            fix="the checkpoint is incomplete, or config.json is of another model",
        )


def _tensor_counts(paths: Iterable[Path]) -> tuple[int, int]:
    """How many tensors safetensors files hold, by their headers (format: a length of 8 bytes, then JSON), and how many
    bytes; 0 for others.
    """
    tensors = size = 0
    for path in paths:
        check_regular(path)
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length <= LONGEST_HEADER else {}
        except (OSError, ValueError, RecursionError):  # whoever reads the weights says what is wrong with the file
            continue
        tensors += len(header) if isinstance(header, dict) else 0
        size += path.stat().st_size
    return tensors, size


def _items(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _items(value)
