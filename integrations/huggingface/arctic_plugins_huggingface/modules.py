"""Which weights of a model can be encoded, what checkpoints call them, and putting frozen modules in the place of
transformers' own.

Linear modules, and the experts of mixtures, which transformers holds as fused three-dimensional parameters
(``gate_up_proj [E, 2I, K]``, ``down_proj [E, K, I]``) and writes to checkpoints as one matrix per expert. Read in
transformers 5.19.0 (``integrations/moe.py``, ``core_model_loading.py``, ``conversion_mapping.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from arctic_plugins.claims import LinearSpec
from arctic_plugins.errors import CheckpointError
from arctic_plugins.frozen import (
    Codec,
    ExpertsDispatch,
    FrozenExperts,
    FrozenLinear,
    FrozenModule,
    FrozenWeight,
    ModuleCodecs,
    Placement,
)

__all__ = [
    "dispatch_experts",
    "each_expert",
    "expert_conversions",
    "freeze_modules",
    "frozen_weights",
    "plain_experts",
    "split_conversions",
    "split_weight",
    "stored_codecs",
    "stored_names",
    "stored_shapes",
    "thaw_modules",
    "weight_conversions",
    "weight_specs",
]

EXPERT = "*"
"""Stands for an expert's number in the names that :func:`stored_names` gives."""
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What ``use_experts_implementation`` leaves on the experts of a model."""


class FrozenHostExperts(FrozenExperts):
    """The experts ``host`` of a model in transformers, whose activation it calls and which it can give back."""

    def __init__(self, host: Any, dtype: torch.dtype) -> None:
        super().__init__(
            host.num_experts,
            host._apply_gate if host.has_gate else host.act_fn,
            up=_up(host),
            dtype=dtype,
            dispatch=getattr(host, "dispatch", None),
        )
        self.__dict__["host"] = host  # not a submodule: it has no parameters left

    def to_host(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module of transformers, with decoded weights."""
        host: nn.Module = self.__dict__["host"]
        for leaf in self.frozen:
            host.register_parameter(
                leaf, nn.Parameter(self.decode(dtype or self.compute_dtype, leaf), requires_grad=False)
            )
        return host.train(self.training)


def weight_specs(model: nn.Module) -> dict[str, LinearSpec]:
    """Dotted name -> shape of every weight that a plugin may claim, on the meta device or loaded: linear modules by
    their own name, the weights of experts by that of the parameter."""
    tied = {name.removesuffix(".weight") for name in (getattr(model, "all_tied_weights_keys", None) or {})}
    specs: dict[str, LinearSpec] = {}
    conversions = _reversed(model) if any(_is_experts(module) for module in model.modules()) else ([], [])
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, FrozenLinear):
            specs[name] = LinearSpec(module.out_features, module.in_features, module.bias is not None, name in tied)
        elif isinstance(module, FrozenExperts):
            specs |= {f"{name}.{leaf}": _experts_spec(weight.shape) for leaf, weight in module.frozen.items()}
        elif _is_experts(module) and _trouble(name, module, conversions) is None:
            specs |= {
                f"{name}.{leaf}": _experts_spec(tuple(getattr(module, leaf).shape))
                for leaf in (_up(module), "down_proj")
            }
    return specs


def _experts_spec(shape: tuple[int, ...]) -> LinearSpec:
    experts, out_features, in_features = shape
    return LinearSpec(out_features, in_features, experts=experts)


def plain_experts(model: nn.Module) -> dict[str, str]:
    """Dotted name of experts that cannot be encoded -> why."""
    conversions = _reversed(model) if any(_is_experts(module) for module in model.modules()) else ([], [])
    found = {name: _trouble(name, module, conversions) for name, module in model.named_modules() if _is_experts(module)}
    return {name: why for name, why in found.items() if why is not None}


def _is_experts(module: Any) -> bool:
    return not isinstance(module, FrozenModule) and all(hasattr(module, flag) for flag in _FLAGS)


def _up(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _trouble(name: str, experts: Any, conversions: tuple[list[WeightRenaming], list[WeightConverter]]) -> str | None:
    """Why experts cannot be encoded."""
    if experts.is_transposed or experts.has_bias or not experts.is_concatenated:
        return "their weights are transposed or interleaved, or have biases"
    if getattr(experts, "_is_expert_parallel", False):
        return "transformers has distributed them"
    if not all(isinstance(getattr(experts, leaf, None), Tensor) for leaf in (_up(experts), "down_proj")):
        return "their weights have other names"
    if any(_stored(f"{name}.{leaf}", *conversions) is None for leaf in (_up(experts), "down_proj")):
        return "checkpoints hold them fused"
    return None


def _reversed(model: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """What saving does to names, as ``revert_weight_conversion`` does it."""
    return _split([transform.reverse_transform() for transform in weight_conversions(model)[::-1]])


def weight_conversions(model: Any) -> list[WeightTransform]:
    """Between checkpoint and ``model``: those it was loaded with, or those of its architecture."""
    conversions: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = [
            entry
            for entry in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(entry, PrefixChange)
        ]
    return conversions


def split_conversions(model: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """What loading does to names."""
    return _split(weight_conversions(model))


def _split(transforms: list[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    return [entry for entry in transforms if isinstance(entry, WeightRenaming)], [
        entry for entry in transforms if isinstance(entry, WeightConverter)
    ]


def _stored(
    parameter: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
) -> tuple[str, ...] | None:
    """The modules of a checkpoint that hold the fused parameter of experts, one below the other; None if they are not
    one matrix per expert.
    """
    key, pattern = rename_source_key(parameter, renamings, converters, reverse=True)
    converter = next((entry for entry in converters if pattern in entry.source_patterns), None)
    if converter is None or not all(
        isinstance(step, (Chunk, SplitModulelist, UnstackExperts)) for step in converter.operations
    ):
        return None
    first = converter.target_patterns[0]
    names = [key.replace(first, target) for target in converter.target_patterns]
    if not all(name.endswith(".weight") and name.split(".").count(EXPERT) == 1 for name in names):
        return None
    return tuple(name.removesuffix(".weight") for name in names)


def stored_names(model: nn.Module, specs: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name of :func:`weight_specs` -> the modules that hold it in a checkpoint, which ``quantization_config`` names.

    A linear module is held by the one of its own name; experts by ``...experts.*.w1`` and ``...experts.*.w3`` for
    instance, of which the first holds the upper half of ``gate_up_proj``, where ``*`` stands for the expert's number.
    """
    conversions: tuple[list[WeightRenaming], list[WeightConverter]] | None = None
    stored: dict[str, tuple[str, ...]] = {}
    for name in specs:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent) if parent else model
        if isinstance(getattr(module, leaf), nn.Module):
            stored[name] = (name,)
        else:
            conversions = conversions or _reversed(model)
            found = _stored(name, *conversions)
            assert found is not None, "weight_specs leaves other experts out"
            stored[name] = found
    return stored


def stored_shapes(specs: Mapping[str, LinearSpec], stored: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[int, int]]:
    """Every module that holds a weight in a checkpoint, each expert's by its own name -> ``(N, K)``."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, spec in specs.items():
        for part in stored[name]:
            rows = spec.out_features // len(stored[name])
            parts = [part] if spec.experts is None else each_expert(part, spec.experts)
            shapes |= dict.fromkeys(parts, (rows, spec.in_features))
    return shapes


def each_expert(stored: str, experts: int) -> list[str]:
    """Of a name of :func:`stored_names`: that of every expert's module."""
    return [stored.replace(f".{EXPERT}.", f".{expert}.") for expert in range(experts)]


def stored_codecs(codecs: ModuleCodecs, stored: Mapping[str, tuple[str, ...]]) -> dict[str, Codec]:
    """Name of :func:`weight_specs` -> its codec in a checkpoint.

    Raises:
        CheckpointError: modules that are one weight here have different codecs.
    """
    found: dict[str, Codec] = {}
    for name, parts in stored.items():
        here = [codecs.codec_of(part) for part in parts]
        if len(set(here)) > 1:
            raise CheckpointError(
                f"quantization_config.modules has {' and '.join(parts)} encoded differently",
                expected="one codec",
                fix="make the checkpoint again",
            )
        if here[0] is not None:
            found[name] = here[0]
    return found


def split_weight(name: str, spec: LinearSpec) -> tuple[str, str]:
    """(module, name of its weight) of a name of :func:`weight_specs`."""
    if spec.experts is None:
        return name, "weight"
    module, _, leaf = name.rpartition(".")
    return module, leaf


def dispatch_experts(model: PreTrainedModel, dispatches: Mapping[str, ExpertsDispatch]) -> None:
    """Leave room for the experts of this process only, in a ``model`` on the meta device.

    Args:
        model: to change.
        dispatches: name of :func:`weight_specs` -> the dispatch.
    """
    if any(dispatch.size > 1 for dispatch in dispatches.values()):
        model.generate = partial(model.generate, synced_gpus=True)  # type: ignore[method-assign]  # processes go on until all have finished
    for name, dispatch in dispatches.items():
        path, leaf = name.rpartition(".")[::2]
        host: Any = model.get_submodule(path)
        plain, part = getattr(host, leaf), dispatch.local(host.num_experts)
        host.register_parameter(leaf, nn.Parameter(plain[part].clone(), requires_grad=plain.requires_grad))
        host.dispatch = dispatch
        model.set_experts_implementation(dispatch.experts_implementation)


def freeze_modules(
    model: nn.Module,
    codecs: Mapping[str, Codec],
    placements: Mapping[str, Placement],
    *,
    device: torch.device | str | None = None,
    until_encoded: bool = False,
) -> None:
    """Replace the modules of these weights by frozen ones.

    Args:
        model: to change.
        codecs: name of :func:`weight_specs` -> codec.
        placements: name -> where its bytes go.
        device: where to allocate empty buffers; default: where the plain weight is.
        until_encoded: keep the plain weights for :meth:`FrozenModule.encode` instead.
    """
    specs = weight_specs(model)
    for name, codec in codecs.items():
        path, leaf = split_weight(name, specs[name])
        module: Any = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            options: dict[str, Any] = {
                "device": device,
                "name": path,
                "placement": placements.get(name),
                "until_encoded": until_encoded,
            }
            model.set_submodule(path, FrozenLinear.from_linear(module, codec, **options))
            continue
        host, plain = (module.__dict__["host"] if isinstance(module, FrozenHostExperts) else module), None
        if host is module:
            module = FrozenHostExperts(host, getattr(host, leaf).dtype).train(host.training)
            model.set_submodule(path, module)
        plain = host._parameters.pop(leaf)
        weight = FrozenWeight(tuple(plain.shape), codec, name, placements.get(name))
        module.add_weight(leaf, weight, device=device or plain.device, until_encoded=plain if until_encoded else None)


def thaw_modules(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put transformers' own modules with decoded weights back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FrozenLinear):
            model.set_submodule(name, module.to_linear(dtype))
        elif isinstance(module, FrozenHostExperts):
            model.set_submodule(name, module.to_host(dtype))


def frozen_weights(model: nn.Module) -> dict[str, tuple[FrozenModule, str]]:
    """Parameter name (``...q_proj.weight``, ``...experts.down_proj``) -> the frozen module and its name in there."""
    return {
        f"{name}.{leaf}": (module, leaf)
        for name, module in model.named_modules()
        if isinstance(module, FrozenModule)
        for leaf in module.frozen
    }


class StackExperts(MergeModulelist):
    """Loader step: matrices of experts, one below the other in a new first dimension."""

    @property
    def reverse_op(self) -> ConversionOps:
        return UnstackExperts(self.dim)


class UnstackExperts(ConversionOps):
    """Saver step, in place of transformers' own, which also drops other dimensions of size one: those of codes with one
    group, for instance.
    """

    def __init__(self, dim: int = 0) -> None:
        self.dim = dim

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for source, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            target = target_patterns[0] if len(input_dict) == 1 and len(target_patterns) == 1 else source
            parts |= {
                target.replace(EXPERT, str(expert)): matrix.contiguous()
                for expert, matrix in enumerate(tensor.unbind(self.dim))
            }
        return parts

    @property
    def reverse_op(self) -> ConversionOps:
        return StackExperts(self.dim)


class LocalExperts(WeightConverter):
    """Stacks only the experts of this process; the others are not read."""

    dispatch: ExpertsDispatch | None = None

    @classmethod
    def of(cls, converter: WeightConverter, dispatch: ExpertsDispatch) -> LocalExperts:
        """``converter`` for the experts that ``dispatch`` leaves here."""
        local = cls(converter.source_patterns, converter.target_patterns, converter.operations)
        for slot in {slot for base in type(converter).__mro__ for slot in getattr(base, "__slots__", ())}:
            if slot not in ("source_patterns", "target_patterns") and hasattr(converter, slot):
                setattr(local, slot, getattr(converter, slot))
        local.dispatch = dispatch
        return local

    def materialize_tensors(self) -> dict[str, list[Tensor]]:
        for pattern, tensors in self.collected_tensors.items():  # one for each expert, in their order
            kept = (
                slice(0, None) if self.dispatch is None else self.dispatch.local(len(tensors))
            )  # None when saving: then all are there
            for other in [*tensors[: kept.start], *tensors[kept.stop or len(tensors) :]]:
                if isinstance(other, Future):
                    other.cancel()
            self.collected_tensors[pattern] = tensors[kept]
        found: dict[str, list[Tensor]] = super().materialize_tensors()
        return found


def expert_conversions(
    conversions: Iterable[WeightTransform], dispatches: Iterable[ExpertsDispatch] = ()
) -> list[WeightTransform]:
    """The same conversions between checkpoint and model, with steps that encoded experts survive; with a dispatch, of
    this process's experts.
    """
    conversions, dispatch = list(conversions), next(iter(dispatches), None)
    if dispatch is not None and dispatch.size > 1:
        conversions = [
            LocalExperts.of(entry, dispatch)
            if isinstance(entry, WeightConverter)
            and any(isinstance(step, MergeModulelist) for step in entry.operations)
            else entry
            for entry in conversions
        ]
    for conversion in conversions:
        if isinstance(conversion, WeightConverter) and all(
            type(step) in (MergeModulelist, Concatenate, StackExperts) for step in conversion.operations
        ):
            conversion.operations = [
                StackExperts(step.dim) if type(step) is MergeModulelist else step for step in conversion.operations
            ]
    return conversions
