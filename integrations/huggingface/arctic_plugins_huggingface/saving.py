"""Saving: checkpoints that describe themselves, and that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from arctic_plugins.errors import CheckpointError, ConfigError, UserError
from arctic_plugins.frozen import FrozenModule
from arctic_plugins.frozen.lora import load_adapter
from arctic_plugins.provenance import read_json, write_provenance
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.checkpoints import adapter_directory
from arctic_plugins_huggingface.loading import load_model, load_tokenizer
from arctic_plugins_huggingface.modules import frozen_weights
from arctic_plugins_huggingface.quantizer import ArcticQuantizationConfig
from arctic_plugins_huggingface.spread import is_spread, whole_experts

__all__ = ["adapter_base", "load_checkpoint", "own_tokenizer", "save_checkpoint", "staged", "writing"]


SHARD_SIZE = "5GB"
"""Of a checkpoint's files: what is saved passes through memory in pieces of this size (transformers' own default is ten times that)."""


def save_checkpoint(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path, stack: Stack) -> Path:
    """Write ``model`` (safetensors and JSON only), its tokenizer and, last, ``arctic_plugins.json`` into the new ``directory``.

    A model whose weights are spread over processes is saved by all of them together: one weight after the other is gathered, and the first process
    writes it to a file in ``directory`` from which it is mapped, so that none ever holds the whole. An adapter needs none of that.

    Raises:
        ConfigError: ``directory`` exists and is not empty.
    """
    if is_spread(model):
        return _save_spread(model, tokenizer, Path(directory), stack)
    spread = {} if isinstance(model, PeftModel) else {name: found for name, found in frozen_weights(model).items() if _is_spread(*found)}
    if spread and torch.distributed.get_rank() > 0:
        for module, leaf in spread.values():
            module.export(leaf)
        torch.distributed.barrier()  # until the first process has written it
        return Path(directory)
    with staged(directory) as draft, _says_what_is_encoded(model.config):
        with _gathered(model, spread, draft / "gathered"):
            model.save_pretrained(draft, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(draft)
        write_provenance(draft, stack)
    if spread:
        torch.distributed.barrier()
    return Path(directory)


def _save_spread(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path, stack: Stack) -> Path:
    """All processes together: the first one writes what the others hold, too."""
    is_adapter = isinstance(model, PeftModel)
    first = torch.distributed.get_rank() == 0
    with staged(directory) if first else nullcontext(directory) as draft:
        with whole_experts(model, draft, only_trainable=is_adapter) as experts:
            if first:
                frozen = {} if is_adapter else frozen_weights(model)
                exported = {
                    name: {suffix: experts.pop(f"{name}{suffix}") for suffix in list(module.frozen[leaf].parameters or ())}
                    for name, (module, leaf) in frozen.items()
                    if name in experts or any(f"{name}{suffix}" in experts for suffix in module.frozen[leaf].parameters or ())
                }
                quantizer = getattr(model, "hf_quantizer", None)
                if quantizer is not None and not is_adapter:
                    quantizer.exported = {**exported, **{name: {"": tensor} for name, tensor in experts.items()}}
                with _says_what_is_encoded(model.config):
                    model.save_pretrained(draft, max_shard_size=SHARD_SIZE, state_dict={**model.state_dict(), **experts})
                if quantizer is not None:
                    quantizer.exported = {}
        if first:
            tokenizer.save_pretrained(draft)
            write_provenance(draft, stack)
    torch.distributed.barrier()
    return directory


def _is_spread(module: FrozenModule, leaf: str) -> bool:
    handle = module.frozen[leaf].handle
    return handle is not None and handle.collective


@contextmanager
def _gathered(model: PreTrainedModel | PeftModel, spread: Mapping[str, tuple[FrozenModule, str]], directory: Path) -> Iterator[None]:
    """Let the quantizer find the weights that are ``spread`` over processes in files in ``directory``, for the time of the block."""
    if not spread:
        yield
        return
    directory.mkdir()
    quantizer = model.hf_quantizer
    try:
        for number, (name, (module, leaf)) in enumerate(spread.items()):
            path = directory / f"{number}.safetensors"
            save_file({f"weight{suffix}": buffer for suffix, buffer in module.export(leaf).items()}, path)
            quantizer.exported[name] = {key.removeprefix("weight"): buffer for key, buffer in load_file(path).items()}  # mapped
        yield
    finally:
        quantizer.exported = {}
        shutil.rmtree(directory)


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


def load_checkpoint(checkpoint: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what this project saved, or any model: an adapter directory comes back on its base, encoded as in training.

    Raises:
        CheckpointError: see :func:`~arctic_plugins_huggingface.load_model` and :func:`adapter_base`.
    """
    adapter = adapter_directory(checkpoint)
    if adapter is None:
        return load_model(checkpoint)
    model, tokenizer = load_model(adapter_base(adapter), Stack.from_checkpoint(adapter).without("adapter"))
    return load_adapter(model, adapter).eval(), own_tokenizer(adapter) or tokenizer


def own_tokenizer(adapter: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with an adapter: training may have given it another chat template than the base's."""
    return load_tokenizer(adapter) if (Path(adapter) / "tokenizer_config.json").is_file() else None


def adapter_base(adapter: Path) -> str:
    """The model that the PEFT adapter in the directory ``adapter`` was trained on.

    Raises:
        CheckpointError: its config does not name a base.
    """
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise CheckpointError(f"{adapter}/adapter_config.json names no base model", fix="set its base_model_name_or_path")
    return base


def check_new(directory: str | Path) -> None:
    """Raise :class:`~arctic_plugins.errors.ConfigError` unless ``directory`` is absent or empty: nothing the user has is overwritten."""
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not empty", expected="a new directory", fix="remove it or name another")


@contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """Give a directory beside ``directory`` to write into, and rename it to ``directory`` when the block ends well; otherwise remove it.

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
    """Turn what libraries raise when a disk is full, or may not be written to, into one UserError that names ``directory``.

    safetensors and torch say it in the text of errors of their own.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        number = error.errno if isinstance(error, OSError) else next((code for code in _UNWRITABLE if f"(os error {code})" in text), None)
        if number in _UNWRITABLE:
            raise UserError(f"{directory} cannot be written: {os.strerror(number)}", fix=fix) from error
        if "PytorchStreamWriter failed" in text or "unexpected pos" in text:  # torch/serialization.py, 2.13: torch.save on a full disk
            raise UserError(f"{directory} cannot be written: torch.save could not write all of a file", fix=fix) from error
        raise
