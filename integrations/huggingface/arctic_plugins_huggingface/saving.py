"""Saving: checkpoints that describe themselves, and that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from arctic_plugins.adapter import base_of
from arctic_plugins.errors import CheckpointError, ConfigError, UserError
from arctic_plugins.frozen import FrozenModule
from arctic_plugins.provenance import write_provenance
from arctic_plugins.recorded import stack_from_checkpoint
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.checkpoints import adapter_directory
from arctic_plugins_huggingface.gathering import is_adapted, is_spread, whole_weights
from arctic_plugins_huggingface.loading import load_model, load_tokenizer
from arctic_plugins_huggingface.modules import frozen_weights
from arctic_plugins_huggingface.quantizer import ArcticQuantizationConfig

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["adapter_base", "load_checkpoint", "own_tokenizer", "save_checkpoint", "staged", "writing"]


SHARD_SIZE = "5GB"
"""Of a checkpoint's files: what is saved passes through memory in pieces of this size (transformers' own default is ten
times that).
"""


def save_checkpoint(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path, stack: Stack
) -> Path:
    """Write ``model`` (safetensors and JSON only), its tokenizer and, last, ``arctic_plugins.json`` into the new
    ``directory``.

    A model whose weights are spread over processes is saved by all of them together: one weight after the other is
    gathered, and the first process writes it to a file in ``directory`` from which it is mapped, so that none ever
    holds the whole. An adapter needs none of that.

    Raises:
        ConfigError: ``directory`` exists and is not empty.
    """
    directory, is_adapter = Path(directory), is_adapted(model)
    together = is_spread(model) or (
        not is_adapter and any(_is_shared_out(*found) for found in frozen_weights(model).values())
    )
    saves = not together or torch.distributed.get_rank() == 0
    with staged(directory) if saves else nullcontext(directory) as draft:
        with _in_stored_dtype(model), whole_weights(model, draft / "gathered", only_trainable=is_adapter) as whole:
            if saves:
                with _says_what_is_encoded(model.config), _exporting(model, whole):
                    model.save_pretrained(
                        draft, max_shard_size=SHARD_SIZE, state_dict={**model.state_dict(), **whole} if whole else None
                    )
        if saves:
            tokenizer.save_pretrained(draft)
            write_provenance(draft, stack.to_dict())
    if together:
        torch.distributed.barrier()  # until the first process has written it
    return directory


def _is_shared_out(module: FrozenModule, leaf: str) -> bool:
    handle = module.frozen[leaf].handle
    return handle is not None and handle.collective


@contextmanager
def _exporting(model: PreTrainedModel | PeftModel, whole: dict[str, Tensor]) -> Iterator[None]:
    """Let the quantizer, which is asked for what is saved, know of ``whole`` tensors, for the time of the block."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        yield
        return
    quantizer.exported = whole
    try:
        yield
    finally:
        quantizer.exported = {}


@contextmanager
def _in_stored_dtype(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """With ``model`` in the dtype of the checkpoint that it was loaded from, where the processor made it compute in a
    wider one.
    """
    stored = None if is_adapted(model) else getattr(model, "arctic_stored_dtype", None)
    if stored is None:
        yield
        return
    encoded = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, FrozenModule)
        for parameter in module.encoded()
    }
    wide = [
        (parameter, parameter.data)
        for parameter in model.parameters()
        if parameter.is_floating_point() and id(parameter) not in encoded
    ]
    for parameter, data in wide:
        parameter.data = data.to(stored)
    try:
        yield
    finally:
        for parameter, data in wide:
            parameter.data = data


@contextmanager
def _says_what_is_encoded(config: PreTrainedConfig) -> Iterator[None]:
    """Without a ``quantization_config`` when nothing is encoded: a placement alone leaves nothing in a checkpoint."""
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, ArcticQuantizationConfig) or quantization.to_dict()["modules"]:
        yield
        return
    del config.quantization_config
    try:
        yield
    finally:
        config.quantization_config = quantization


def load_checkpoint(
    checkpoint: str | Path, stack: Stack | None = None, *, base: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what this project saved, or any model: an adapter directory comes back on its base, encoded as in training.

    Args:
        checkpoint: directory or hub id.
        stack: what to apply beside that: placements, which are never taken from a checkpoint.
        base: of an adapter, if it is not where its config says.

    Raises:
        CheckpointError: see :func:`~arctic_plugins_huggingface.load_model` and :func:`adapter_base`.
    """
    adapter = adapter_directory(checkpoint)
    if adapter is None:
        return load_model(checkpoint, stack)
    recorded = stack_from_checkpoint(adapter).to_use().without("adapter")
    model, tokenizer = load_model(adapter_base(adapter, base), recorded.plus(stack or Stack()))
    from arctic_plugins.frozen.lora import load_adapter

    return load_adapter(model, adapter).eval(), own_tokenizer(adapter) or tokenizer


def own_tokenizer(adapter: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with an adapter: training may have given it another chat template than the
    base's.
    """
    return load_tokenizer(adapter) if (Path(adapter) / "tokenizer_config.json").is_file() else None


def adapter_base(adapter: Path, base: str | Path | None = None) -> str:
    """The model that the PEFT adapter in the directory ``adapter`` was trained on, or ``base`` if it is given.

    Raises:
        CheckpointError: its config does not name a base, or one inside of ``adapter``.
    """
    if base is not None:
        return str(base)
    base = base_of(adapter)
    if Path(base).resolve().is_relative_to(Path(adapter).resolve()):
        raise CheckpointError(
            f"{adapter} brings {base} as its own base",
            expected="a model that you chose",
            fix=f"--base {base}, if you trust it",
        )
    return base


def check_new(directory: str | Path) -> None:
    """Raise :class:`~arctic_plugins.errors.ConfigError` unless ``directory`` is absent or empty: nothing the user has
    is overwritten.
    """
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"{path} exists and is not empty", expected="a new directory", fix="remove it or name another"
        )


@contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """Give a directory beside ``directory`` to write into, and rename it to ``directory`` when the block ends well;
    otherwise remove it.

    Raises:
        ConfigError: ``directory`` exists and is not empty.
        UserError: the disk is full, or may not be written to.
    """
    check_new(directory)
    path = Path(directory)
    draft = path.with_name(f"{path.name}.unfinished")
    with writing(path):
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            if path.exists():
                path.rmdir()
            draft.rename(path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


@contextmanager
def writing(directory: Path, fix: str = "free space or name another directory") -> Iterator[None]:
    """Turn what libraries raise when a disk is full, or may not be written to, into one UserError that names
    ``directory``.

    safetensors and torch say it in the text of errors of their own.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        number = (
            error.errno
            if isinstance(error, OSError)
            else next((code for code in _UNWRITABLE if f"(os error {code})" in text), None)
        )
        if number in _UNWRITABLE:
            raise UserError(f"{directory} cannot be written: {os.strerror(number)}", fix=fix) from error
        if (
            "PytorchStreamWriter failed" in text or "unexpected pos" in text
        ):  # torch/serialization.py, 2.13: torch.save on a full disk
            raise UserError(
                f"{directory} cannot be written: torch.save could not write all of a file", fix=fix
            ) from error
        raise
