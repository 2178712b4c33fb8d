"""Conversions for transformers' loader: stack and unstack encoded experts, and load only those of this process."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightTransform,
)

from arctic_plugins.frozen import ExpertsDispatch

__all__ = ["EXPERT", "LocalExperts", "StackExperts", "UnstackExperts", "expert_conversions"]

EXPERT = "*"
"""Placeholder for an expert's number in the module names of a checkpoint."""


class StackExperts(MergeModulelist):
    """Loader step that stacks the matrices of experts along a new first dimension."""

    @property
    def reverse_op(self) -> ConversionOps:
        return UnstackExperts(self.dim)


class UnstackExperts(ConversionOps):
    """Saver step that splits stacked experts into one matrix per expert.

    transformers' own step also drops other dimensions of size one, for example that of codes with a single group.
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
    """Converter that stacks only the experts of this process; the others are not read."""

    dispatch: ExpertsDispatch | None = None

    @classmethod
    def of(cls, converter: WeightConverter, dispatch: ExpertsDispatch) -> LocalExperts:
        """Return ``converter``, restricted to the experts that ``dispatch`` keeps in this process."""
        local = cls(converter.source_patterns, converter.target_patterns, converter.operations)
        for slot in {slot for base in type(converter).__mro__ for slot in getattr(base, "__slots__", ())}:
            if slot not in ("source_patterns", "target_patterns") and hasattr(converter, slot):
                setattr(local, slot, getattr(converter, slot))
        local.dispatch = dispatch
        return local

    def materialize_tensors(self) -> dict[str, list[Tensor]]:
        for pattern, tensors in self.collected_tensors.items():  # one per expert, in order
            kept = (
                slice(0, None) if self.dispatch is None else self.dispatch.local(len(tensors))
            )  # None when saving: all experts are present then
            for other in [*tensors[: kept.start], *tensors[kept.stop or len(tensors) :]]:
                if isinstance(other, Future):
                    other.cancel()
            self.collected_tensors[pattern] = tensors[kept]
        found: dict[str, list[Tensor]] = super().materialize_tensors()
        return found


def expert_conversions(
    conversions: Iterable[WeightTransform], dispatches: Iterable[ExpertsDispatch] = ()
) -> list[WeightTransform]:
    """Return the conversions between checkpoint and model, with steps that keep encoded experts intact.

    With a dispatch, they load only the experts of this process.
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
