"""``arctic_plugins.json``: written last into every checkpoint, so that its presence says that the checkpoint is complete."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_plugins.errors import CheckpointError

if TYPE_CHECKING:
    from arctic_plugins.stack import Stack

__all__ = ["FILE_NAME", "FORMAT", "Provenance", "read_provenance", "write_provenance"]

FILE_NAME = "arctic_plugins.json"
FORMAT = 1
"""Version of this file and of the checkpoint's encoded weights; a reader refuses what is newer."""

_RECORDED = ("arctic-plugins", "arctic-plugins-huggingface", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Provenance:
    """What ``arctic_plugins.json`` says."""

    stack: dict[str, dict[str, Any]]
    sha256: str
    versions: dict[str, str]
    format: int = FORMAT


def write_provenance(directory: str | Path, stack: Stack) -> Path:
    """Write the canonical stack, its digest and the versions that made the checkpoint. Call it when everything else is on disk.

    The file appears whole or not at all (written beside its place, flushed to disk, then renamed).
    """
    path = Path(directory) / FILE_NAME
    recorded = {*_RECORDED, *(f"arctic-plugins-{plugin.name}" for plugin in stack)}
    versions = {name: found for name in sorted(recorded) if (found := _version(name))}
    content = {"format": FORMAT, "stack": stack.to_dict(), "sha256": stack.sha256(), "versions": versions}
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
        CheckpointError: absent (not a checkpoint of ours, or its save was cut off), malformed, or of a newer format.
    """
    path = Path(directory) / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{directory} has no {FILE_NAME}", expected="a checkpoint that arctic-plugins finished writing", fix="name another directory"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix="save the checkpoint again") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise CheckpointError(f"{path} has no integer 'format'", fix="save the checkpoint again")
    if content["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}", expected=f"at most {FORMAT}", fix="upgrade arctic-plugins")
    try:
        return Provenance(content["stack"], content["sha256"], content.get("versions", {}), content["format"])
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the key {error}", fix="save the checkpoint again") from error


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
