"""PEFT's layers over frozen linear modules. Read in peft 0.21.2.

While a layer computes, ``weight`` of the frozen module below it is the decoded weight, decoded if the layer reads it.
While the layer merges, the module is a plain one, and the result is encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from arctic_plugins.errors import ArcticError
from arctic_plugins.frozen.linear import FrozenLinear
from arctic_plugins.frozen.module import FrozenModule

__all__ = ["BeforeMerge", "FrozenLoraLinear", "over_frozen_layer"]


@dataclass
class BeforeMerge:
    """A frozen weight as it was before an adapter was merged into it."""

    buffers: dict[str, Tensor]
    version: int
    bias: Tensor | None = None
    """The bias of the same layer, which some adapters change."""
    merged_version: int = 0
    """Version of the weight right after the merge, to detect whether another adapter has been merged since."""

    @classmethod
    def of(cls, frozen: FrozenModule, leaf: str = "weight", kept: BeforeMerge | None = None) -> BeforeMerge:
        """Record a weight before a merge, or return ``kept``, the record of an earlier one.

        Call :meth:`merged` after the merge.
        """
        if kept is not None:
            kept.check(frozen, leaf)
            return kept
        bias = getattr(frozen, "bias", None)
        bias = None if bias is None else bias.detach().clone()
        return cls(frozen.export(leaf), frozen.frozen[leaf].version, bias)

    def decode(self, frozen: FrozenModule, leaf: str = "weight") -> Tensor:
        """Return the weight in float32."""
        weight = frozen.frozen[leaf]
        return weight.codec.decode(self.on(frozen), weight.shape, torch.float32)

    def on(self, frozen: FrozenModule) -> dict[str, Tensor]:
        """Return the buffers where ``frozen`` computes."""
        return {suffix: buffer.to(frozen.weight_device) for suffix, buffer in self.buffers.items()}

    def merged(self, frozen: FrozenModule, leaf: str = "weight") -> BeforeMerge:
        """Record the version of the merged ``frozen`` weight, and return this object."""
        self.merged_version = frozen.frozen[leaf].version
        return self

    def check(self, frozen: FrozenModule, leaf: str = "weight") -> None:
        """Raise ArcticError if something else has changed the weight since the merge."""
        if frozen.frozen[leaf].version != self.merged_version:
            raise ArcticError(
                f"{frozen.frozen[leaf].name} was changed after an adapter had been merged into it",
                expected="adapters of several layers on one module to be unmerged in reverse order",
                fix="unmerge the other adapter first, or load the model again",
            )

    def give_back(self, frozen: FrozenModule, leaf: str = "weight") -> None:
        """Restore the weight, and the bias if there is one."""
        self.check(frozen, leaf)
        frozen.hold(self.on(frozen), leaf)
        frozen.frozen[leaf].version = self.version
        if self.bias is not None:
            cast("FrozenLinear", frozen).bias.data.copy_(self.bias)


@cache
def over_frozen_layer(kind: Any) -> Any:
    """Return a subclass of ``kind``, a layer of PEFT, that works over a :class:`FrozenLinear`.

    It derives from ``kind`` alone, so that the class of an existing layer can be changed to it.
    """
    if hasattr(kind, "_before_merge"):
        return kind

    class OverFrozen(kind):  # type: ignore[misc]
        _before_merge: BeforeMerge | None = None

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.disable_adapters and self.merged:
                self.unmerge()
            if not getattr(self, "lora_variant", True):  # plain LoRA does not look at the weight
                return super().forward(*args, **kwargs)
            with _decoded(self):
                return super().forward(*args, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Merge as PEFT does, but all merged adapters at once, so that the sum is rounded once.

            The original bytes are kept until the layer is unloaded. The codec refuses NaN and Inf whatever the value
            of ``safe_merge``.
            """
            new = check_adapters_to_merge(self, adapter_names)
            if not new:
                return
            frozen, already = self.get_base_layer(), list(self.merged_adapters)
            before = BeforeMerge.of(frozen, kept=self._before_merge)
            bias = before.bias
            if bias is not None:
                bias = nn.Parameter(bias.to(torch.float32, copy=True), requires_grad=False)
            original = before.decode(frozen)
            self.merged_adapters.clear()
            try:
                with frozen.as_plain(original.clone(), bias):
                    super().merge(safe_merge=safe_merge, adapter_names=already + new)
                    weight, bias = frozen.weight, frozen.bias
                if not torch.equal(weight, original):  # an unchanged weight is not rounded again
                    frozen.encode(weight.detach())
                elif already:  # what is merged now is undone by the new adapters
                    frozen.hold(before.on(frozen))
            except BaseException:
                self.merged_adapters[:] = already
                raise
            if bias is not None:
                frozen.bias.data = bias.data.to(frozen.bias.dtype)
            if self.merged_adapters != already:
                self._before_merge = before.merged(frozen)

        def unmerge(self, *args: Any, **kwargs: Any) -> None:
            """Restore the bytes from before the first merge, which undoes all merged adapters at once."""
            frozen = self.get_base_layer()
            if not isinstance(frozen, FrozenLinear):  # within merge
                super().unmerge(*args, **kwargs)
                return
            if self._before_merge is not None:
                self._before_merge.give_back(frozen)
                self._before_merge = None
                if hasattr(self, "_base_weight_before_merge"):  # of HiRA and FRoD
                    self._base_weight_before_merge = None
            self.merged_adapters.clear()

        def __reduce_ex__(self, protocol: Any) -> Any:
            # pickle finds classes by name, and this class has the name of another.
            return (_again, (kind,), self.__dict__)

    for name in _READING:
        if (method := getattr(kind, name, None)) is not None:
            setattr(OverFrozen, name, _with_decoded(method))
    OverFrozen.__name__, OverFrozen.__qualname__, OverFrozen.__module__ = (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
    )
    return OverFrozen


_READING = ("get_delta_weight", "update_scaling", "_move_adapter_to_device_of_base_layer")
"""Methods of PEFT's layers, besides ``forward``, that look at the weight below and are called from elsewhere."""


def _with_decoded(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _decoded(self):
            return method(self, *args, **kwargs)

    return called


def _decoded(layer: Any) -> AbstractContextManager[None]:
    frozen = layer.get_base_layer()
    # Within merge, the module is a plain one.
    return frozen.as_decoded() if isinstance(frozen, FrozenLinear) else nullcontext()


def _again(kind: Any) -> Any:
    """Return an empty layer of :func:`over_frozen_layer`, for pickle and copy."""
    found = over_frozen_layer(kind)
    return found.__new__(found)


FrozenLoraLinear = over_frozen_layer(LoraLinear)
FrozenLoraLinear.__doc__ = "PEFT's LoRA layer over a :class:`FrozenLinear`."
