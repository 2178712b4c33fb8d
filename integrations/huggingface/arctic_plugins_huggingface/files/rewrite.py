"""Rewriting checkpoints file by file without building a model, so that memory is bounded by one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from arctic_plugins.errors import CheckpointError, CodecError, named
from arctic_plugins.files import copy_files
from arctic_plugins.provenance import FILE_NAME

__all__ = ["INDEX", "Read", "open_files", "rewrite"]

INDEX = "model.safetensors.index.json"
"""The file that maps names of tensors to files of a checkpoint that has several."""
Read = Callable[[str], Tensor]
"""Function that reads a tensor of a module by its name in the module, such as ``weight_scale``."""


def open_files(source: Path, stack: ExitStack) -> dict[str, Any]:
    """Open the safetensors files of a checkpoint for as long as ``stack`` lasts; return file name -> file."""
    files = {}
    for path in sorted(source.glob("*.safetensors")):
        try:
            files[path.name] = stack.enter_context(safe_open(path, "pt"))
        except Exception as error:  # safetensors raises its own exception class
            raise CheckpointError(f"{path} cannot be read: {error}", fix="copy or download it again") from error
    if not files:
        raise CheckpointError(f"{source} has no safetensors files", fix="convert the checkpoint to safetensors")
    return files


def rewrite(
    source: Path,
    draft: Path,
    config: Mapping[str, Any],
    modules: Container[str],
    tensors: Callable[[str, Read], Mapping[str, Tensor]],
) -> None:
    """Write every file of ``source`` to ``draft``, with new tensors for ``modules`` and ``config`` as ``config.json``.

    For each of ``modules``, the tensors that ``tensors(module, read)`` returns (name in the module -> tensor) replace
    all tensors whose names start with that of its weight. Everything else is copied unchanged.

    Raises:
        CheckpointError: a file cannot be read, or lacks a tensor.
        CodecError: raised by ``tensors``; the module's name is added.
    """
    with ExitStack() as stack:
        files = open_files(source, stack)
        where = {key: file for file in files.values() for key in file.keys()}  # noqa: SIM118 - safe_open is not a mapping

        def rewritten(key: str) -> Iterator[tuple[str, Tensor]]:
            name, _, suffix = key.rpartition(".weight")
            if name not in modules:
                yield key, where[key].get_tensor(key)
            elif not suffix:  # the module's other buffers are written with its codes
                with named(name, CodecError):
                    yield from (
                        (f"{name}.{part}", tensor)
                        for part, tensor in tensors(name, lambda part: _read(where, f"{name}.{part}")).items()
                    )

        weight_map: dict[str, str] = {}
        total = 0
        for file_name, file in files.items():
            here = {new: tensor for key in file.keys() for new, tensor in rewritten(key)}  # noqa: SIM118
            save_file(here, draft / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(here, file_name)
            total += sum(tensor.nbytes for tensor in here.values())
        if (source / INDEX).is_file():
            (draft / INDEX).write_text(
                json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            )
    copy_files(
        source, draft, lambda name: not name.endswith(".safetensors") and name not in (INDEX, FILE_NAME, "config.json")
    )
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _read(where: Mapping[str, Any], key: str) -> Tensor:
    if key not in where:
        raise CheckpointError(
            f"{key} is missing from the checkpoint", fix="the checkpoint is incomplete: create it again"
        )
    return where[key].get_tensor(key)
