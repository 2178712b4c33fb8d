"""Saving checkpoints that describe themselves, and that appear complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from arctic_plugins.frozen import FrozenModule
from arctic_plugins.provenance import write_provenance
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.checkpoints.gather import is_adapted, is_spread, whole_weights
from arctic_plugins_huggingface.files.staging import staged
from arctic_plugins_huggingface.loading.quantizer import ArcticQuantizationConfig
from arctic_plugins_huggingface.loading.tasks import labels_of
from arctic_plugins_huggingface.loading.weights import frozen_weights

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["save_checkpoint"]

SHARD_SIZE = "5GB"
"""Maximum size of a checkpoint's files. Tensors pass through memory in pieces of this size when they are saved.

transformers' own default is ten times as large.
"""


def save_checkpoint(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path, stack: Stack
) -> Path:
    """Write ``model``, its tokenizer and, last, ``arctic_plugins.json`` to the new ``directory``.

    Only safetensors and JSON are written. A model whose weights are spread over processes is saved by all of them
    together: the weights are gathered one at a time, and the first process writes each to a file in ``directory`` and
    maps it from there, so that no process ever holds the whole model. An adapter does not need this.

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
                        str(draft),
                        max_shard_size=SHARD_SIZE,
                        state_dict={**model.state_dict(), **whole} if whole else None,
                    )
        if saves:
            tokenizer.save_pretrained(draft)
            write_provenance(draft, stack.to_dict(), config=labels_of(model) if is_adapter else None)
    if together:
        torch.distributed.barrier()  # wait until the first process has written it
    return directory


def _is_shared_out(module: FrozenModule, leaf: str) -> bool:
    handle = module.frozen[leaf].handle
    return handle is not None and handle.collective


@contextmanager
def _exporting(model: PreTrainedModel | PeftModel, whole: dict[str, Tensor]) -> Iterator[None]:
    """Give the ``whole`` tensors to the quantizer, which provides what is saved, for the duration of the block."""
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
    """Convert ``model`` to the dtype of its checkpoint for the duration of the block.

    Does nothing unless the model computes in a wider dtype because of the processor.
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
    """Remove the ``quantization_config`` for the duration of the block if nothing is encoded.

    A placement alone leaves no trace in a checkpoint.
    """
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, ArcticQuantizationConfig) or quantization.to_dict()["modules"]:
        yield
        return
    del config.quantization_config
    try:
        yield
    finally:
        config.quantization_config = quantization
