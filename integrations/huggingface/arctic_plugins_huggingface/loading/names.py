"""Names of weights in a checkpoint, where transformers renames, stacks or splits them while loading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    PrefixChange,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from arctic_plugins.claims import LinearSpec
from arctic_plugins.errors import CheckpointError
from arctic_plugins.frozen import Codec, ModuleCodecs
from arctic_plugins_huggingface.loading.conversions import EXPERT, UnstackExperts

__all__ = [
    "Renamed",
    "each_expert",
    "in_checkpoint",
    "split_conversions",
    "stored_codecs",
    "stored_names",
    "stored_shapes",
    "weight_conversions",
]

Renamed = Callable[[str], str]


def _reversed(model: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """Return the conversions that saving applies to names, as ``revert_weight_conversion`` does."""
    return _split([transform.reverse_transform() for transform in weight_conversions(model)[::-1]])


def weight_conversions(model: Any) -> list[WeightTransform]:
    """Return the conversions between checkpoint and ``model``: those it was loaded with, or its architecture's."""
    conversions: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = [
            entry
            for entry in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(entry, PrefixChange)
        ]
    return conversions


def split_conversions(model: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """Return the conversions that loading applies to names."""
    return _split(weight_conversions(model))


def _split(transforms: list[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    return [entry for entry in transforms if isinstance(entry, WeightRenaming)], [
        entry for entry in transforms if isinstance(entry, WeightConverter)
    ]


def _stored(
    parameter: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
) -> tuple[str, ...] | None:
    """Return the checkpoint modules that hold a fused parameter of experts, in the order of concatenation.

    None if the checkpoint does not hold one matrix per expert.
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
    """Map each name of :func:`weight_specs` to the modules that hold it in a checkpoint and in ``quantization_config``.

    A linear module has the same name in a checkpoint, unless transformers renames it. Experts are held, for example, by
    ``...experts.*.w1`` and ``...experts.*.w3``, where ``*`` stands for the expert's number and the first holds the
    upper half of ``gate_up_proj``.
    """
    conversions = _reversed(model)
    stored: dict[str, tuple[str, ...]] = {}
    for name in specs:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent) if parent else model
        if isinstance(getattr(module, leaf), nn.Module):
            key, pattern = rename_source_key(f"{name}.weight", *conversions, reverse=True)
            stored[name] = (key.removesuffix(".weight") if pattern is None else name,)
        else:
            found = _stored(name, *conversions)
            assert found is not None, "weight_specs leaves out all other experts"
            stored[name] = found
    return stored


def in_checkpoint(model: nn.Module, codecs: ModuleCodecs, stored: Mapping[str, tuple[str, ...]]) -> Renamed:
    """Return the function from a name of :func:`stored_names` to the name in a checkpoint encoded with ``codecs``.

    The two differ if one of the checkpoint and ``model`` has a head and the other has not: transformers adds or removes
    the name of the base model (``model.``), as ``rename_source_key`` does.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    choices: tuple[Renamed, ...] = (str, lambda name: name.removeprefix(prefix), lambda name: f"{prefix}{name}")
    parts = [part for parts in stored.values() for part in parts]
    return next((to for to in choices if any(codecs.codec_of(to(part)) is not None for part in parts)), str)


def stored_shapes(specs: Mapping[str, LinearSpec], stored: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[int, int]]:
    """Map every checkpoint module that holds a weight to ``(N, K)``; each expert's module has its own name."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, spec in specs.items():
        for part in stored[name]:
            rows = spec.out_features // len(stored[name])
            parts = [part] if spec.experts is None else each_expert(part, spec.experts)
            shapes |= dict.fromkeys(parts, (rows, spec.in_features))
    return shapes


def each_expert(stored: str, experts: int) -> list[str]:
    """Return the module name of every expert, given a name returned by :func:`stored_names`."""
    return [stored.replace(f".{EXPERT}.", f".{expert}.") for expert in range(experts)]


def stored_codecs(
    codecs: ModuleCodecs, stored: Mapping[str, tuple[str, ...]], renamed: Renamed = str
) -> dict[str, Codec]:
    """Map each name of :func:`weight_specs` to its codec in a checkpoint.

    Args:
        codecs: those of the checkpoint.
        stored: the result of :func:`stored_names`.
        renamed: the result of :func:`in_checkpoint`.

    Raises:
        CheckpointError: modules that form one weight in the model have different codecs.
    """
    found: dict[str, Codec] = {}
    for name, parts in stored.items():
        here = [codecs.codec_of(renamed(part)) for part in parts]
        if len(set(here)) > 1:
            raise CheckpointError(
                f"quantization_config.modules encodes {' and '.join(parts)} differently",
                expected="the same codec",
                fix="create the checkpoint again",
            )
        if here[0] is not None:
            found[name] = here[0]
    return found
