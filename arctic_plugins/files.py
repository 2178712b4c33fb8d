"""Files of a checkpoint, which may be a stranger's: what one names is opened only within it, and what one says is bounded by what is there."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from arctic_plugins.errors import CheckpointError

__all__ = ["check_keys", "check_sizes", "file_within", "read_json", "tensor_counts"]

LONGEST_JSON = 256 << 20
"""Bytes; a tokenizer of 256,000 entries takes 33 MB."""
LONGEST_HEADER = 100 << 20
"""Bytes of a safetensors file's header, as in the library."""
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_decoder_layers", "num_encoder_layers", "num_nextn_predict_layers")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
ELSEWHERE = ("transformers_weights", "speculators_config")
"""Keys with which transformers 5.19 reads weights from another file, a pickle as well, and vllm 0.32 serves another model."""
KERNELS = ("attn_implementation", "attn_implementation_internal", "experts_implementation", "experts_implementation_internal")
"""Keys whose values transformers 5.19 takes for code on the hub where they have a slash."""
FEW = 1000
"""Layers or experts that cost next to nothing, whatever files hold: some models use a layer's weights several times."""


def file_within(directory: str | Path, name: Any, where: str | Path) -> Path:
    """The file of ``directory`` that ``where`` names: it may be absent, or a link to another file, as in the hub's cache.

    Raises:
        CheckpointError: ``name`` is not a relative path that stays in ``directory``, or there is something else than a file: a device would be read
            for ever.
    """
    if not isinstance(name, str) or not name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise CheckpointError(f"{where} names {name!r}", expected="a file of its own directory", fix="do not use this checkpoint, or make it again")
    path = Path(directory) / name
    check_regular(path)
    return path


def check_regular(path: Path) -> None:
    """Raise CheckpointError if ``path`` is there and no file."""
    try:
        mode = path.stat().st_mode
    except OSError:  # absent, or unreadable, as opening it will say
        return
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a regular file", expected="a file of the checkpoint", fix="copy or download the checkpoint again")


def read_json(path: Path) -> dict[str, Any]:
    """Read a checkpoint's JSON file whose top level is an object.

    Raises:
        CheckpointError: absent, unreadable, malformed (with line and column), not a regular file, or not an object.
    """
    check_regular(path)
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes", expected=f"at most {LONGEST_JSON}", fix="copy it again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", fix="the checkpoint is incomplete: make it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path} is not valid JSON: {error}", fix="copy it again, or save the checkpoint again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}", expected="an object", fix="copy it again, or save the checkpoint again")
    return content


def check_keys(config: Mapping[str, Any], where: str | Path) -> None:
    """Check that a ``config.json`` names nothing else to load: neither kernels of a hub, nor other files, nor another model.

    Raises:
        CheckpointError: names the key.
    """
    for key, value in _items(config):
        if (key in ELSEWHERE and value is not None) or (str(key).strip("_") in KERNELS and "/" in str(value)):
            found = f"{where} has {key} {value!r}"
            raise CheckpointError(found, expected="a model in this directory alone", fix=f"remove '{key}', if you trust the rest")


def tensor_counts(paths: Iterable[Path]) -> tuple[int, int]:
    """How many tensors safetensors files hold, by their headers (format: a length of 8 bytes, then JSON), and how many bytes; 0 for others."""
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


def check_sizes(config: Mapping[str, Any], counts: tuple[int, int], where: str | Path) -> None:
    """Check that ``config`` speaks of no more layers than there are tensors, and of no more experts than there are bytes: hosts build what it says.

    Args:
        config: content of a ``config.json``, nested configs included.
        counts: tensors, and bytes, of its files; see :func:`tensor_counts`.
        where: the file, for messages.

    Raises:
        CheckpointError: names the key.
    """
    tensors, size = counts
    for key, value in _items(config):
        most = tensors if key in LAYERS else size
        if key in (*LAYERS, *EXPERTS) and isinstance(value, (int, float)) and value > max(most, FEW):
            raise CheckpointError(
                f"{where} has {key} {value}", expected=f"no more than its files hold ({tensors} tensors)", fix="config.json is of another model"
            )


def _items(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _items(value)
