"""What a stack will do to a model, settled before weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedConfig,
)

from arctic_plugins.claims import Claims, LinearSpec
from arctic_plugins.compute import dtype_name
from arctic_plugins.errors import CheckpointError, ClaimError, ConfigError
from arctic_plugins.frozen import (
    Codec,
    ExpertsDispatch,
    ModuleCodecs,
    Placement,
    PlainCodec,
    chain,
)
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.files.check import check_checkpoint
from arctic_plugins_huggingface.loading.config import is_encoded, load_config, only_hub, skeleton, stored_dtype
from arctic_plugins_huggingface.loading.names import stored_codecs, stored_names, stored_shapes
from arctic_plugins_huggingface.loading.quantizer import ArcticQuantizationConfig
from arctic_plugins_huggingface.loading.weights import (
    weight_specs,
)

__all__ = ["claims", "configured", "planned_config"]


def configured(config: PreTrainedConfig, stack: Stack) -> dict[str, Any]:
    """What ``stack`` changes in ``config``, which is changed: key of ``config.json`` -> value."""
    before = config.to_dict()
    stack.hf_configure_model(config)
    return {key: value for key, value in config.to_dict().items() if key not in before or before[key] != value}


def planned_config(checkpoint: str | Path, stack: Stack, **kwargs: Any) -> dict[str, Any]:
    """What ``config.json`` of the plain ``checkpoint`` (directory or hub id) would say otherwise had ``stack`` been
    applied; reads no weights.

    Raises:
        ConfigError: ``stack`` changes nothing, or the checkpoint is quantized already.
        ClaimError: see :meth:`arctic_plugins.stack.Stack.claim`.
    """
    kwargs = check_checkpoint(checkpoint, **kwargs)
    config = load_config(checkpoint, **only_hub(kwargs))
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{checkpoint} is quantized already", expected="a plain checkpoint", fix="leave the plugins out"
        )
    changes = configured(config, stack)
    quantization = claims(config, stack.without("placement", "experts_dispatch")).quantization()
    if quantization is not None:
        changes["quantization_config"] = quantization.to_dict()
    if not changes:
        raise ConfigError(
            "the plugins change nothing of this model",
            expected="a plugin that fills 'weight_codec' or 'rope'",
            fix="fp8, for instance",
        )
    return changes


def _owners(codecs: Mapping[str, Codec], stored: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, Codec], list[str]]:
    """A checkpoint's module name -> codec, and the names of all of its modules."""
    return {part: codec for name, codec in codecs.items() for part in stored[name]}, [
        part for parts in stored.values() for part in parts
    ]


def _local(spec: LinearSpec, dispatch: ExpertsDispatch) -> tuple[int, ...]:
    """Shape of this process's part of experts."""
    experts, *matrix = spec.shape
    part = dispatch.local(experts)
    return (part.stop - part.start, *matrix)


def _place(
    claims: Claims, codecs: Mapping[str, Codec], specs: Mapping[str, LinearSpec]
) -> tuple[dict[str, Placement], dict[str, int]]:
    """Let the claimed placements choose among the encoded weights: name -> its (chain of) placement, and name -> bytes
    on the compute device.
    """
    dispatches = claims.exclusive("experts_dispatch")
    resident = {name: codec.nbytes(specs[name].shape) for name, codec in codecs.items()}
    for name in dispatches.keys() & resident.keys():
        resident[name] = codecs[name].nbytes(_local(specs[name], dispatches[name]))
    claimed = claims.by_slot.get("placement", {})
    position: dict[Placement, int] = {}  # in the chain: that of the stack, also where a module has only the later ones
    for placements in claimed.values():
        for index, placement in enumerate(placements):
            position[placement] = max(index, position.get(placement, 0))
    chains: dict[str, list[Placement]] = {}
    for placement in sorted(position, key=lambda placement: position[placement]):
        spread = dispatches if placement.collective else {}
        wanted = {name: resident[name] for name in codecs if placement in claimed.get(name, ()) and name not in spread}
        if not wanted:
            name = next(name for name, placements in claimed.items() if placement in placements)
            raise ClaimError(
                f"a placement is claimed for {name} and no other weight that is encoded",
                expected="encoded weights",
                fix="correct its patterns",
            )
        left = placement.plan(wanted)
        for name, nbytes in left.items():
            chains.setdefault(name, []).append(placement)
            resident[name] = nbytes
    return {name: chain(placements) for name, placements in chains.items()}, resident


@dataclass(frozen=True)
class Claimed:
    """What a stack claims of a model.

    Names are those of :func:`~arctic_plugins_huggingface.loading.weights.weight_specs`.
    """

    specs: dict[str, LinearSpec]
    """Every weight that can be claimed."""
    claims: Claims
    codecs: dict[str, Codec]
    """The claimed ones, or those of an encoded checkpoint; when nothing is encoded, the plain one of every weight that
    a placement claims.
    """
    stored: dict[str, tuple[str, ...]]
    """Name -> the modules that hold it in a checkpoint."""
    placements: dict[str, Placement]
    """Of the encoded weights that are not resident."""
    dispatches: dict[str, ExpertsDispatch]
    """Of the experts that are spread over processes, or whose tokens may be dropped."""
    resident: dict[str, int]
    """Bytes of every encoded weight on the compute device, in this process."""
    elements: int
    """Of all tensors of the model, decoded."""

    def quantization(self) -> ArcticQuantizationConfig | None:
        """To load a plain checkpoint with; None when its weights stay as they are."""
        return (
            ArcticQuantizationConfig.from_owners(*_owners(self.codecs, self.stored), self.placements, self.dispatches)
            if self.codecs or self.dispatches
            else None
        )

    def on_disk(self) -> dict[str, tuple[Codec, tuple[int, int]]]:
        """Every encoded module of a checkpoint -> its codec and the weight's (N, K)."""
        shapes = {name: stored_shapes({name: self.specs[name]}, self.stored) for name in self.codecs}
        return {part: (self.codecs[name], shape) for name, parts in shapes.items() for part, shape in parts.items()}


def claims(config: PreTrainedConfig, stack: Stack, dtype: torch.dtype | str = "auto") -> Claimed:
    """What ``stack`` claims of the model of ``config``, loaded in ``dtype``.

    Raises:
        ClaimError: plugins clash, or the stack would encode otherwise what the checkpoint has encoded already.
        UserError: what a placement's plan raises.
    """
    stored = stored_dtype(config)  # building a model changes what the config says
    model = skeleton(config, dtype)
    specs = weight_specs(model)
    names = stored_names(model, specs)
    claimed = stack.claim(config, specs)
    codecs = claimed.exclusive("weight_codec")
    if is_encoded(config):
        codecs = _stored_codecs(config, codecs, specs, names)
    elif (
        not codecs
    ):  # placements move plain weights, too; the output head stays, as it does when a codec encodes the rest
        heads = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
        kept = stored if dtype == "auto" else model.dtype  # bytes as they are on disk, products in the compute dtype
        plain = PlainCodec(dtype_name(kept))
        codecs = {
            name: plain
            for name in specs
            if name in claimed.by_slot.get("placement", {}) and not specs[name].tied and name not in heads
        }
    placements, resident = _place(claimed, codecs, specs)
    elements = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    return Claimed(specs, claimed, codecs, names, placements, claimed.exclusive("experts_dispatch"), resident, elements)


def _stored_codecs(
    config: PreTrainedConfig,
    codecs: Mapping[str, Codec],
    specs: Mapping[str, LinearSpec],
    stored: Mapping[str, tuple[str, ...]],
) -> dict[str, Codec]:
    """The codecs of an encoded checkpoint, which have to be those that the stack claims, if it claims any."""
    quantization = config.quantization_config
    existing = ModuleCodecs.from_config(quantization if isinstance(quantization, Mapping) else quantization.to_dict())
    found = stored_codecs(existing, stored)
    if codecs and codecs != found:
        name = next(name for name in specs if codecs.get(name) != found.get(name))
        raise ClaimError(
            f"the checkpoint has {found.get(name) or 'a plain weight'} at {name}, but the stack wants "
            f"{codecs.get(name) or 'a plain weight'}",
            fix="start from the plain checkpoint, or give the codec plugin the options with which this one was made",
        )
    if existing.modules and not found:
        raise CheckpointError(
            "quantization_config.modules matches no linear module of this model", fix="config.json is of another model"
        )
    return found
