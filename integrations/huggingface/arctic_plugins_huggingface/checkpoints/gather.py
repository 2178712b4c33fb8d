"""Gathering tensors of which each process holds a part, to save them whole."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arctic_plugins.frozen import local_parameters
from arctic_plugins_huggingface.loading.weights import frozen_weights

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["is_adapted", "is_spread", "whole_weights"]


def is_adapted(model: nn.Module) -> TypeGuard[PeftModel]:
    """Return whether ``model`` is a PEFT model, without importing PEFT: if it is one, PEFT is already imported."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def is_spread(model: nn.Module) -> bool:
    """Return whether the experts of ``model`` are spread over processes."""
    return bool(local_parameters(model))


@contextmanager
def whole_weights(model: nn.Module, directory: Path, *, only_trainable: bool = False) -> Iterator[dict[str, Tensor]]:
    """Gather the tensors of which each process holds a part: name -> tensor in the first process, empty in the others.

    Collective, unless there are no such tensors. They are gathered one at a time, written to files in the new
    ``directory`` and mapped from there for the duration of the block.
    """
    whole: dict[str, Tensor] = {}
    try:
        for number, (name, tensor) in enumerate(_whole(model, only_trainable)):
            if tensor is not None:
                directory.mkdir(parents=True, exist_ok=True)
                path = directory / f"{number}.safetensors"
                save_file({"whole": tensor}, path)
                del tensor
                whole[name] = load_file(path)["whole"]
        yield whole
    finally:
        if whole:  # other processes may have the same directory
            shutil.rmtree(directory)


def _whole(model: nn.Module, only_trainable: bool) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the tensors of weights that a placement has split, and those of experts, wherever their bytes are."""
    local, pairs = local_parameters(model), {}
    if "peft" in sys.modules:  # without it there are no adapters
        from arctic_plugins_huggingface.adapters.lora import expert_pairs

        pairs = expert_pairs(model)
    first = torch.distributed.is_initialized() and torch.distributed.get_rank() == 0
    placed = {
        name: found for name, found in frozen_weights(model).items() if found[0].frozen[found[1]].handle is not None
    }
    for name, (module, leaf) in placed.items():
        if only_trainable or not (name in local or module.frozen[leaf].handle.collective):  # type: ignore[union-attr]
            continue
        for suffix, buffer in module.export(leaf).items():
            parts = local[name][1].gather(buffer) if name in local else [buffer] if first else None
            yield f"{name}{suffix}", None if parts is None else torch.cat(parts)
    for name, (parameter, dispatch) in local.items():
        if name not in placed and (parameter.requires_grad or not only_trainable):
            parts = dispatch.gather(parameter)
            yield name, None if parts is None else pairs[name].join(parts) if name in pairs else torch.cat(parts)
