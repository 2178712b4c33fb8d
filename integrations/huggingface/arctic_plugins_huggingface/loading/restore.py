"""Restoring a checkpoint's weights into an existing model, where transformers' Trainer cannot.

Read in transformers 5.19.0.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import rename_source_key

from arctic_plugins.errors import CheckpointError
from arctic_plugins_huggingface.loading.names import each_expert, split_conversions, stored_names
from arctic_plugins_huggingface.loading.weights import weight_specs

__all__ = ["restore_weights"]


@torch.no_grad()
def restore_weights(model: nn.Module, directory: str | Path, skip: Collection[str] = ()) -> None:
    """Copy the safetensors files of ``directory`` into the parameters of ``model``.

    The two may name or split weights differently. ``Trainer._load_from_checkpoint`` calls
    ``load_state_dict(strict=False)`` with the names in the file. Fused experts, which checkpoints store as one matrix
    per expert, would silently stay unchanged.

    Args:
        model: the plain model, as loaded by transformers.
        directory: a checkpoint of this model.
        skip: names of parameters to leave unchanged.

    Raises:
        CheckpointError: a parameter is missing from the checkpoint; names it.
    """
    parameters, (renamings, converters) = dict(model.named_parameters()), split_conversions(model)
    specs = {
        name: spec
        for name, spec in weight_specs(model).items()
        if spec.experts is not None and name in parameters and name not in skip
    }
    matrices: dict[str, Tensor] = {}  # name in the file -> part of a fused parameter
    for name, parts in stored_names(model, specs).items():
        for number, part in enumerate(parts):
            for expert, key in enumerate(each_expert(part, len(parameters[name]))):
                matrices[f"{key}.weight"] = parameters[name][expert].chunk(len(parts))[number]
    missing = {
        name: None
        for name in parameters
        if name not in {*skip, *specs, *(getattr(model, "all_tied_weights_keys", None) or ())}
    }
    missing |= dict.fromkeys(matrices)
    for path in Path(directory).glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key in matrices:
                    matrices[key].copy_(file.get_tensor(key))
                    missing.pop(key, None)
                    continue
                name, pattern = rename_source_key(key, renamings, converters)
                if pattern is None and name in parameters and name not in skip:
                    parameters[name].copy_(file.get_tensor(key))
                    missing.pop(name, None)
    if missing:
        raise CheckpointError(
            f"{directory} lacks {min(missing)}", fix="the checkpoint is incomplete: resume from another"
        )
