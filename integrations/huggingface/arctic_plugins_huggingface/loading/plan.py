"""The plan of a model: what a stack will do to it, settled before weights are read.

:func:`plan_model` is the one place where a config is read and changed, plugins validate it, and claims are settled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from arctic_plugins.claims import Claims, LinearSpec
from arctic_plugins.compute import dtype_name
from arctic_plugins.errors import CheckpointError, ClaimError, ConfigError
from arctic_plugins.files import check_elements
from arctic_plugins.frozen import Codec, ExpertsDispatch, ModuleCodecs, Placement, PlainCodec, chain
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.files.check import check_checkpoint, check_encoded
from arctic_plugins_huggingface.loading.config import (
    device_of,
    is_encoded,
    load_config,
    load_tokenizer,
    only_hub,
    resolve_dtype,
    skeleton,
    stored_dtype,
)
from arctic_plugins_huggingface.loading.names import stored_codecs, stored_names, stored_shapes
from arctic_plugins_huggingface.loading.quantizer import ArcticQuantizationConfig, register
from arctic_plugins_huggingface.loading.weights import weight_specs

__all__ = ["ModelPlan", "WeightPlan", "configured", "plan_model", "plan_weights", "planned_config"]


@dataclass(frozen=True)
class WeightPlan:
    """What becomes of a model's weights. Names are those of
    :func:`~arctic_plugins_huggingface.loading.weights.weight_specs`.
    """

    specs: dict[str, LinearSpec]
    """Every weight that can be claimed."""
    claims: Claims
    """What the plugins claim of them, slot by slot."""
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
        """The ``quantization_config`` to load a plain checkpoint with; None when its weights stay as they are."""
        if not self.codecs and not self.dispatches:
            return None
        return ArcticQuantizationConfig.from_owners(*self._owners(), self.placements, self.dispatches)

    def stored_quantization(self) -> dict[str, Any]:
        """The ``quantization_config`` to load an encoded checkpoint with."""
        stored = ModuleCodecs.from_owners(*self._owners()).to_config()
        return {**stored, "placements": self.placements, "dispatches": self.dispatches}

    def on_disk(self) -> dict[str, tuple[Codec, tuple[int, int]]]:
        """Every encoded module of a checkpoint -> its codec and the weight's (N, K)."""
        shapes = {name: stored_shapes({name: self.specs[name]}, self.stored) for name in self.codecs}
        return {part: (self.codecs[name], shape) for name, parts in shapes.items() for part, shape in parts.items()}

    def _owners(self) -> tuple[dict[str, Codec], list[str]]:
        """A checkpoint's module name -> codec, and the names of all of its modules."""
        owners = {part: codec for name, codec in self.codecs.items() for part in self.stored[name]}
        return owners, [part for parts in self.stored.values() for part in parts]


@dataclass(frozen=True)
class ModelPlan:
    """What a stack will do to the model of a checkpoint. Made by :func:`plan_model`; load it once, with
    :func:`~arctic_plugins_huggingface.load_model`.
    """

    checkpoint: str
    """Directory or hub id."""
    stack: Stack
    config: PreTrainedConfig
    """The checkpoint's, as the stack changed it."""
    changes: dict[str, Any]
    """What the stack changed in it: key of ``config.json`` -> value."""
    weights: WeightPlan
    skeleton: PreTrainedModel = field(repr=False)
    """The plain model on the meta device: shapes without data."""
    stored_dtype: torch.dtype
    """That of the checkpoint."""
    asked_dtype: torch.dtype | str
    dtype: torch.dtype
    """That of products, and of what is not encoded."""
    dtype_reason: str
    """Why it is not the checkpoint's, or why it is slow here; empty if there is nothing to say."""
    warnings: tuple[str, ...]
    """Of the plugins, each behind its plugin's name."""
    load: dict[str, Any] = field(repr=False)
    """Further arguments of ``from_pretrained``."""
    contents_checked: bool
    """Whether the digests of a directory's files were compared."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, read when it is first asked for.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        return load_tokenizer(self.checkpoint, config=self.config, **only_hub(self.load))

    @property
    def encoded(self) -> bool:
        """Whether the checkpoint holds encoded weights already."""
        return is_encoded(self.config)


def plan_model(
    checkpoint: str | Path,
    stack: Stack | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    checked: bool = False,
    **kwargs: Any,
) -> ModelPlan:
    """Settle what ``stack`` will do to the model of ``checkpoint``. Reads no weights.

    Args:
        checkpoint: directory or hub id; plain or encoded.
        stack: what to apply; ``None`` applies nothing.
        dtype: see :func:`~arctic_plugins_huggingface.load_model`.
        checked: whether the caller has checked the files with
            :func:`~arctic_plugins_huggingface.files.check.check_checkpoint`, and without their contents, which
            ``load_model`` then compares.
        **kwargs: further arguments of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        UserError: everything that can be known to fail before weights are read: host versions, a damaged checkpoint,
            what plugins refuse, clashing claims, an encoded checkpoint that the stack would encode differently.
    """
    register()
    stack = stack or Stack()
    stack.check_host("transformers")
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "training is configured for DeepSpeed's ZeRO stage 3, which splits weights while they are loaded",
            expected="stage 1 or 2; plugins spread frozen weights (slot 'placement') and experts ('experts_dispatch')",
            fix="correct zero_optimization.stage",
        )
    kwargs.setdefault("trust_remote_code", False)
    if "gguf_file" not in kwargs:
        kwargs.setdefault("use_safetensors", True)  # never a pickle unless the user asks for one
    if not checked:
        kwargs = check_checkpoint(checkpoint, **kwargs)
    config = kwargs.pop("config", None) or load_config(checkpoint, **only_hub(kwargs))
    stored = stored_dtype(config)
    computes, why = resolve_dtype(stored, dtype, device_of(kwargs))
    changes = configured(config, stack)
    warnings = stack.validate(config, "cuda" if torch.cuda.is_available() else "cpu")
    _check_quantization(config, stack)
    model = skeleton(config, computes)
    weights = plan_weights(model, config, stack, stored if dtype == "auto" else computes)
    _check_files(Path(checkpoint) / kwargs.get("subfolder", ""), config, weights, kwargs.get("variant"))
    _check_experts(kwargs.get("experts_implementation"), weights)
    return ModelPlan(
        checkpoint=str(checkpoint),
        stack=stack,
        config=config,
        changes=changes,
        weights=weights,
        skeleton=model,
        stored_dtype=stored,
        asked_dtype=dtype,
        dtype=computes,
        dtype_reason=why,
        warnings=tuple(warnings),
        load=kwargs,
        contents_checked=not checked,
    )


def configured(config: PreTrainedConfig, stack: Stack) -> dict[str, Any]:
    """Let ``stack`` change ``config`` in place, and return what it changed: key of ``config.json`` -> value."""
    before = config.to_dict()
    stack.hf_configure_model(config)
    return {key: value for key, value in config.to_dict().items() if key not in before or before[key] != value}


def planned_config(checkpoint: str | Path, stack: Stack, **kwargs: Any) -> dict[str, Any]:
    """What ``config.json`` of the plain ``checkpoint`` (directory or hub id) would say otherwise had ``stack`` been
    applied. Reads no weights.

    Raises:
        ConfigError: ``stack`` changes nothing, or the checkpoint is quantized already.
        UserError: see :func:`plan_model`.
    """
    kwargs = check_checkpoint(checkpoint, **kwargs)
    config = load_config(checkpoint, **only_hub(kwargs))
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{checkpoint} is quantized already", expected="a plain checkpoint", fix="leave the plugins out"
        )
    part = stack.without("placement", "experts_dispatch")
    plan = plan_model(checkpoint, part, checked=True, config=config, **kwargs)
    changes = dict(plan.changes)
    if (quantization := plan.weights.quantization()) is not None:
        changes["quantization_config"] = quantization.to_dict()
    if not changes:
        raise ConfigError(
            "the plugins change nothing of this model",
            expected="a plugin that fills 'weight_codec' or 'rope'",
            fix="fp8, for instance",
        )
    return changes


def plan_weights(
    model: PreTrainedModel, config: PreTrainedConfig, stack: Stack, plain_dtype: torch.dtype
) -> WeightPlan:
    """What ``stack`` claims of ``model``, with data or without, and where its weights will be.

    Args:
        model: of ``config``, plain.
        config: says which weights are encoded already.
        stack: what to apply.
        plain_dtype: of weights that are placed without being encoded.

    Raises:
        ClaimError: plugins clash, or the stack would encode otherwise what the checkpoint has encoded already.
        UserError: what a placement's plan raises.
    """
    specs = weight_specs(model)
    names = stored_names(model, specs)
    claimed = stack.claim(config, specs)
    codecs = claimed.exclusive("weight_codec")
    if is_encoded(config):
        codecs = _stored_codecs(config, codecs, specs, names)
    elif not codecs:
        # Placements move plain weights, too. The output head stays, as it does when a codec encodes the rest.
        heads = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
        plain = PlainCodec(dtype_name(plain_dtype))
        codecs = {
            name: plain
            for name in specs
            if name in claimed.by_slot.get("placement", {}) and not specs[name].tied and name not in heads
        }
    placements, resident = _place(claimed, codecs, specs)
    elements = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    dispatches = claimed.exclusive("experts_dispatch")
    return WeightPlan(specs, claimed, codecs, names, placements, dispatches, resident, elements)


def _check_quantization(config: PreTrainedConfig, stack: Stack) -> None:
    """Raise ClaimError if the checkpoint is quantized by another method, and ``stack`` encodes or places weights."""
    if getattr(config, "quantization_config", None) is None or is_encoded(config):
        return
    if owners := [*stack.only("weight_codec"), *stack.only("placement")]:
        raise ClaimError(
            "the checkpoint is quantized by another method",
            expected="a plain checkpoint",
            fix=f"leave the plugin '{owners[0].name}' out",
        )


def _check_files(directory: Path, config: PreTrainedConfig, weights: WeightPlan, variant: str | None) -> None:
    """Compare what the files of ``directory`` hold with what the model has."""
    if getattr(config, "quantization_config", None) is not None and not is_encoded(config):
        return
    if files := sorted(directory.glob("*.safetensors")):
        check_elements(weights.elements, files, directory / "config.json")
    if is_encoded(config) and directory.is_dir():
        check_encoded(directory, weights.on_disk(), variant)


def _check_experts(implementation: str | None, weights: WeightPlan) -> None:
    """Raise ConfigError if the user asks for another experts function than a dispatch needs."""
    wanted = {dispatch.experts_implementation for dispatch in weights.dispatches.values()}
    if wanted and implementation not in {None, *wanted}:
        raise ConfigError(
            f"experts_implementation is '{implementation}', and a plugin dispatches experts",
            expected=f"'{min(wanted)}'",
            fix="leave it out",
        )


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
