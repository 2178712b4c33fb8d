"""Files of a checkpoint, which may come from an untrusted source.

A file that the checkpoint names is opened only if it is inside the checkpoint. A number that it specifies is checked
against the files that are there.
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

__all__ = [
    "check_directory",
    "check_elements",
    "check_keys",
    "check_sizes",
    "copy_files",
    "file_within",
    "read_json",
    "tensor_shapes",
]

LONGEST_JSON = 256 << 20
"""Maximum size of a JSON file in bytes. A tokenizer with 256,000 entries takes 33 MB."""
LONGEST_HEADER = 100 << 20
"""Maximum size of a safetensors file's header in bytes, as in the library."""
LONGEST_NAME = 255
"""Maximum length of a file's name in bytes, as in common file systems."""
LAYERS = re.compile(r"(^|_)(n_)?(layers?|depths?)$")
"""Keys of a ``config.json`` that specify how many layers are built: ``num_hidden_layers``, ``n_layer``,
``decoder_layers`` and so on.
"""
EXPERTS = re.compile(r"(^|_)experts$")
FEW = 1000
"""Number of layers or experts that is always accepted: they cost little, and some models reuse a layer's weights."""
FEW_ELEMENTS = 1 << 26
"""Number of elements that is always accepted: position tables and similar tensors are not saved."""
ELEMENTS_PER_BYTE = 8
"""Maximum: no format stores a weight in less than one bit."""


def file_within(directory: str | Path, name: Any, where: str | Path) -> Path:
    """Return the path of the file in ``directory`` that ``where`` names.

    The file may be absent, or a link to another file, as in the Hub's cache.

    Raises:
        CheckpointError: ``name`` is not a relative path that stays in ``directory``, or it is not a regular file
            (reading a device would never end).
    """
    if not isinstance(name, str) or not _is_relative(name):
        raise CheckpointError(
            f"{where} names {name!r}",
            expected="a file in its own directory",
            fix="do not use this checkpoint, or create it again",
        )
    path = Path(directory) / name
    check_regular(path)
    return path


def _is_relative(name: str) -> bool:
    """Return whether ``name`` is the relative path of a file in or below a directory, on any file system."""
    path = PurePosixPath(name)
    try:
        fits = all(len(os.fsencode(part)) <= LONGEST_NAME for part in path.parts) and len(name) < 4096
    except UnicodeEncodeError:  # an unpaired UTF-16 surrogate
        return False
    return bool(name) and fits and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def copy_files(source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    """Copy the files in the directory ``source`` whose names are ``wanted`` to the directory ``target``.

    Links are replaced by the files that they lead to.

    Raises:
        CheckpointError: a link leads out of ``source``. In an unpacked archive, it may lead to a file that was never
            meant to be published.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and wanted(path.name):
            if not _is_own(path):
                found = f"{path} is a link to {path.resolve()}"
                raise CheckpointError(
                    found,
                    expected="a file of the checkpoint",
                    fix="replace it with a copy if it belongs there, otherwise remove it",
                )
            shutil.copyfile(path, target / path.name)


def _is_own(path: Path) -> bool:
    """Return whether the file is in its own directory, or in the Hub's cache, where snapshots link to files."""
    found, directory = path.resolve(), path.parent.resolve()
    if found.is_relative_to(directory):
        return True
    snapshots = next((parent for parent in directory.parents if parent.name == "snapshots"), None)
    return snapshots is not None and found.is_relative_to(snapshots.parent / "blobs")


def check_regular(path: Path) -> None:
    """Raise CheckpointError if ``path`` exists and is not a regular file."""
    try:
        mode = path.stat().st_mode
    except OSError:  # absent or unreadable: opening it raises the error
        return
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            f"{path} is not a regular file",
            expected="a file of the checkpoint",
            fix="copy or download the checkpoint again",
        )


def check_directory(directory: Path) -> None:
    """Raise CheckpointError if a checkpoint's directory contains a device or a pipe.

    A host that looks for a file of that name would read it forever.
    """
    for path in sorted(directory.glob("*")) + sorted(directory.glob("additional_chat_templates/*")):
        if not path.is_dir():
            check_regular(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint. Its top level must be an object.

    Raises:
        CheckpointError: the file is absent, unreadable, too large, malformed (with line and column), not a regular
            file, or not an object.
    """
    check_regular(path)
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes", expected=f"at most {LONGEST_JSON}", fix="copy it again"
            )
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\ud" in text.lower():  # an unpaired UTF-16 surrogate cannot be written again, nor be part of a file's name
            json.dumps(content, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", fix="the checkpoint is incomplete: create it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(
            f"{path} is not valid JSON: {error}", fix="copy it again, or save the checkpoint again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} has the top-level type {type(content).__name__}",
            expected="an object",
            fix="copy it again, or save the checkpoint again",
        )
    return content


def check_keys(config: Mapping[str, Any], where: str | Path) -> None:
    """Check that a ``config.json`` names nothing else to load: no code on a hub, no other files and no other model.

    The installed hosts define which keys would do so.

    Raises:
        CheckpointError: the message names the key.
        PluginError: no installed distribution describes a host, so that the keys are unknown.
    """
    known = hosts().values()
    if not known:
        raise PluginError(
            f"{where} cannot be checked: no installed distribution describes a host",
            expected=f"an integration with an entry point in {GROUP}",
            fix="reinstall the integration",
        )
    elsewhere = frozenset[str]().union(*(host.refused_keys for host in known))
    code = frozenset[str]().union(*(host.hub_code_keys for host in known))
    for key, value in _items(config):
        if (key in elsewhere and value is not None) or (str(key).strip("_") in code and "/" in str(value)):
            found = f"{where} has {key} {value!r}"
            raise CheckpointError(
                found, expected="a model in this directory alone", fix=f"remove '{key}' if you trust the rest"
            )


def check_sizes(config: Mapping[str, Any], weights: Iterable[Path], where: str | Path) -> None:
    """Check that ``config`` specifies no more layers than its files have tensors, and no more experts than bytes.

    Hosts build as many as it specifies, one after another.

    Args:
        config: content of a ``config.json``, nested configs included.
        weights: its safetensors files; empty if they are not here. Their headers are read if there are more than
            :data:`FEW` layers or experts.
        where: the file, for messages.

    Raises:
        CheckpointError: the message names the key.
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
                expected=f"at most what its files contain ({tensors} tensors)",
                fix="config.json belongs to another model",
            )


def check_elements(elements: int, weights: Iterable[Path], where: str | Path) -> None:
    """Check that a model has no more ``elements`` than its files can contain.

    Hosts allocate memory for what is missing from a file before they report it.

    Raises:
        CheckpointError: the files have too few bytes.
    """
    size = sum(path.stat().st_size for path in weights)
    if elements > max(FEW_ELEMENTS, ELEMENTS_PER_BYTE * size):
        found = f"{where} describes a model of {elements} elements, but its files have {size} bytes"
        raise CheckpointError(
            found,
            expected="a config.json that matches them",
            fix="the checkpoint is incomplete, or config.json belongs to another model",
        )


def _tensor_counts(paths: Iterable[Path]) -> tuple[int, int]:
    """Return the number of tensors in safetensors files and the number of bytes; 0 for other files.

    Only headers are read (format: a length of 8 bytes, then JSON).
    """
    tensors = size = 0
    for path in paths:
        check_regular(path)
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length <= LONGEST_HEADER else {}
        except (OSError, ValueError, RecursionError):  # the code that reads the weights reports what is wrong
            continue
        tensors += len(header) if isinstance(header, dict) else 0
        size += path.stat().st_size
    return tensors, size


def _items(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _items(value)


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors in a safetensors file, of which only the header is read.

    Raises:
        OSError, safetensors.SafetensorError: the file cannot be read.
    """
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping
