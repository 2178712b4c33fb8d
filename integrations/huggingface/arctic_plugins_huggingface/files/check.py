"""Finding a checkpoint, and everything wrong with it that can be known before its weights are read.

Importing this module loads neither torch nor transformers, and a checkpoint in a directory is checked without them.
Read in transformers 5.19.0.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from arctic_plugins.adapter import ADAPTER, WEIGHTS, AdapterConfig, read_any_adapter
from arctic_plugins.compute import dtype_name
from arctic_plugins.errors import CheckpointError, one_line
from arctic_plugins.files import check_directory, check_keys, check_regular, check_sizes, file_within, read_json
from arctic_plugins.processes import is_first_here
from arctic_plugins.provenance import FILE_NAME, check_files, check_plugins, read_provenance

if TYPE_CHECKING:
    from arctic_plugins.frozen import Codec

__all__ = [
    "adapter_directory",
    "by_step",
    "check_checkpoint",
    "check_encoded",
    "check_unchanged",
    "complete_checkpoints",
    "hub_arguments",
    "hub_trouble",
    "is_directory",
]

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DTYPES = {
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint16": "U16",
    "uint32": "U32",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "bool": "BOOL",
}
"""safetensors' names of dtypes. A codec's buffer of any other dtype is compared by shape alone."""
_SMALL = ["*.json", "*.jinja", "*.txt", "*.model"]


def check_checkpoint(checkpoint: str | Path, *, contents: bool = True, **kwargs: Any) -> dict[str, Any]:
    """Check a checkpoint before its weights are read: that it exists, is complete and unchanged, and not too new.

    Args:
        checkpoint: directory or Hub id.
        contents: whether to read all files once to compare their digests; the other checks take no time.
        **kwargs: arguments of ``from_pretrained``.

    Returns:
        ``kwargs``, with ``local_files_only`` if a Hub id is in the cache and the Hub cannot be reached.

    Raises:
        CheckpointError: names the file, what is wrong with it and what to do.
        PluginNotFoundError: the checkpoint was created with a plugin that is not installed; names the distribution.
    """
    directory = Path(checkpoint) / kwargs.get("subfolder", "")
    if not is_directory(checkpoint):
        kwargs = _check_hub(str(checkpoint), kwargs)
        if found := _hub_file(str(checkpoint), FILE_NAME, kwargs):
            check_plugins(read_provenance(Path(found).parent))
        return kwargs
    if "gguf_file" in kwargs:
        return kwargs
    check_directory(directory)
    config = read_json(directory / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{directory / 'config.json'} has model_type {config.get('model_type')!r}",
            expected="a type of model, for example 'llama'",
            fix="correct it",
        )
    check_keys(config, directory / "config.json")
    if (directory / ADAPTER).exists():  # transformers would silently add it to the model
        raise CheckpointError(
            f"{directory} holds a model and an adapter",
            expected="only one of them",
            fix=f"move {ADAPTER} to a directory of its own",
        )
    check_unchanged(directory, contents=contents)
    if kwargs.get("use_safetensors", True) and "state_dict" not in kwargs:
        held = _weight_files(directory, kwargs.get("variant"))
        _check_weights(directory, held)
        check_sizes(config, held, directory / "config.json")
    return kwargs


def check_encoded(
    directory: Path, encoded: Mapping[str, tuple[Codec, tuple[int, int]]], variant: str | None = None
) -> None:
    """Compare the headers of a checkpoint's files with ``encoded``: module -> its codec and the weight's (N, K).

    The loader does not do this: it casts tensors of another dtype.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape or dtype; names it.
    """
    headers: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in _weight_files(directory, variant):
        with safe_open(path, "pt") as file:
            headers.update(
                {key: (tuple((part := file.get_slice(key)).get_shape()), part.get_dtype()) for key in file.keys()}  # noqa: SIM118
            )
    for module, (codec, weight) in encoded.items():
        for suffix, spec in codec.layout(weight).items():
            name = f"{module}.weight{suffix}"
            if name not in headers:
                raise CheckpointError(
                    f"{name} is missing from {directory}", fix="the checkpoint is incomplete: create it again"
                )
            shape, dtype = headers[name]
            expected = _DTYPES.get(dtype_name(spec.dtype), dtype)
            if (shape, dtype) != (spec.shape, expected):
                raise CheckpointError(
                    f"{name} is {dtype} {shape}",
                    expected=f"{expected} {spec.shape} for {codec}",
                    fix="the checkpoint does not match its config.json: create it again",
                )


def adapter_directory(checkpoint: str | Path, **kwargs: Any) -> Path | None:
    """Return the local directory of a PEFT adapter; None if ``checkpoint`` is a model.

    An adapter with a Hub id is downloaded. The adapter is checked as by :func:`check_checkpoint`.

    Raises:
        CheckpointError: there is neither an adapter nor a model, or it is damaged.
    """
    if not is_directory(checkpoint):
        from huggingface_hub import snapshot_download

        kwargs = _check_hub(str(checkpoint), kwargs)
        if _hub_file(str(checkpoint), ADAPTER, kwargs) is None:
            return None
        allowed = [*_SMALL, WEIGHTS]
        known = {
            key: kwargs[key]
            for key in ("cache_dir", "force_download", "local_files_only", "revision", "token")
            if key in kwargs
        }
        checkpoint = snapshot_download(str(checkpoint), allow_patterns=allowed, **known)
    directory = Path(checkpoint)
    if not (directory / ADAPTER).is_file():
        return None
    check_directory(directory)
    config = read_any_adapter(directory)
    check_unchanged(directory)
    weights = directory / WEIGHTS
    _open(weights)
    with safe_open(weights, "np") as file:
        rows = [file.get_slice(key).get_shape()[0] for key in file.keys() if ".lora_A." in key]  # noqa: SIM118 - safe_open is not a mapping
    if rows and isinstance(config, AdapterConfig) and config.r > max(rows):
        raise CheckpointError(
            f"{directory / ADAPTER} has r {config.r}",
            expected=f"the rank of its tensors, {max(rows)}",
            fix="save the adapter again",
        )
    return directory


def by_step(output: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints that a Trainer left in ``output``, complete or not: (step, directory), ordered by step."""
    named = [(path.name.rpartition("-")[2], path) for path in output.glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in named if step.isdecimal())


def complete_checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of :func:`by_step` that were saved completely."""
    return [path for _, path in by_step(output) if (path / FILE_NAME).is_file()]


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``from_pretrained`` arguments that determine where files come from."""
    shared = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    return {key: kwargs[key] for key in shared if key in kwargs}


def hub_trouble() -> str | None:
    """Return why the Hub is not available; None if it is.

    This makes one attempt; the libraries would retry for half a minute.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "the Hub is not contacted (HF_HUB_OFFLINE)"
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # its class depends on the HTTP library that the Hub's client uses
        return f"{constants.ENDPOINT} cannot be reached ({one_line(error)})"
    return None


def is_directory(checkpoint: str | Path) -> bool:
    """Return True for a local directory and False for a possible Hub id.

    Raises:
        CheckpointError: ``checkpoint`` is neither.
    """
    if Path(checkpoint).is_dir():
        return True
    if Path(checkpoint).exists():
        raise CheckpointError(
            f"{checkpoint} is a file",
            expected="a checkpoint directory or a Hub id",
            fix="pass the directory that contains it",
        )
    if not isinstance(checkpoint, str) or not _HUB_ID.fullmatch(checkpoint) or checkpoint.startswith("."):
        raise CheckpointError(
            f"{checkpoint} does not exist", expected="a checkpoint directory or a Hub id", fix="correct the path"
        )
    return False


def _check_hub(repository: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Contact the Hub once, where transformers would retry for half a minute, and fall back to the cache."""
    trouble = "the Hub is not contacted (local_files_only)" if kwargs.get("local_files_only") else hub_trouble()
    if trouble is None:
        return kwargs
    from transformers.utils.hub import cached_file

    local = {**kwargs, "local_files_only": True}
    for name in ("config.json", ADAPTER):
        if cached_file(
            repository,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_arguments(local),
        ):
            logger.warning("%s comes from the cache: %s", repository, trouble)
            return local
    raise CheckpointError(
        f"'{repository}' is neither a local directory nor in the Hub's cache, and {trouble}",
        expected="a checkpoint directory or a Hub id",
        fix="correct the path, or go online and download it first: hf download " + repository,
    )


def _hub_file(repository: str, name: str, kwargs: Mapping[str, Any]) -> str | None:
    """Return the local copy of a file of a Hub repository; None if the repository has no such file."""
    from transformers.utils.hub import cached_file

    try:
        return cached_file(repository, name, _raise_exceptions_for_missing_entries=False, **hub_arguments(kwargs))
    except OSError as error:
        raise CheckpointError(
            f"{repository} is neither a local directory nor available on the Hub: {one_line(error)}",
            expected="a checkpoint directory or a Hub id",
            fix="correct the name or the revision, or log in: hf auth login",
        ) from error


def check_unchanged(directory: Path, *, contents: bool = True) -> None:
    """Check that the files of a checkpoint are as this project saved them; one process per machine reads them."""
    if (directory / FILE_NAME).is_file():
        check_plugins(read_provenance(directory))
        if contents and is_first_here():
            check_files(directory)


def _weight_files(directory: Path, variant: str | None) -> dict[Path, set[str]]:
    """Map each weight file of a checkpoint to the tensors that the index, if any, lists for it."""
    infix = f".{variant}" if variant else ""
    whole, index = directory / f"model{infix}.safetensors", directory / f"model.safetensors.index{infix}.json"
    if whole.is_file():
        return {whole: set()}
    if not index.is_file():
        pickled = sorted(
            path.name
            for pattern in ("*.bin", "*.pt", "*.pth")
            for path in directory.glob(pattern)
            if path.name != "training_args.bin"
        )
        fix = (
            f"convert {pickled[0]}; pickles are read only with load: {{use_safetensors: false}}"
            if pickled
            else "the checkpoint is incomplete"
        )
        raise CheckpointError(f"{directory} has no {whole.name}", expected="weights in safetensors", fix=fix)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            f"{index} has no valid 'weight_map'",
            expected="an object that maps tensors to files",
            fix="create the checkpoint again",
        )
    held: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        held.setdefault(name, set()).add(tensor)
    return {file_within(directory, name, index): held[name] for name in sorted(held)}


def _check_weights(directory: Path, files: Mapping[Path, set[str]]) -> None:
    """Check that the weight files are complete and hold the tensors that the index lists."""
    for path, tensors in files.items():
        if not path.is_file():
            raise CheckpointError(
                f"the index of {directory} lists {path.name}, which is missing",
                fix="copy the missing shard, or create the checkpoint again",
            )
        if missing := tensors - _open(path):
            raise CheckpointError(
                f"{path} lacks {min(missing)}, which the index lists for it", fix="create the checkpoint again"
            )


def _open(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file; the library checks its header and length."""
    check_regular(path)
    try:
        with safe_open(path, "np") as file:
            return set(file.keys())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", fix="the checkpoint is incomplete: copy or save it again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated: {one_line(error).removeprefix('SafetensorError: ')}",
            expected="a complete safetensors file",
            fix="copy or download it again, or save the checkpoint again",
        ) from error
