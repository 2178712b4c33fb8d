"""A linear layer over encoded bytes, for any codec and placement; gradients flow through it, never into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from arctic_plugins.frozen.codec import Buffers, Codec
from arctic_plugins.frozen.module import FrozenModule, FrozenWeight
from arctic_plugins.frozen.placement import Handle, Placement

__all__ = ["DecodedWeight", "FrozenLinear"]

_ABOUT = {
    getattr(Tensor, name).__get__
    for name in ("device", "dtype", "is_cuda", "is_meta", "layout", "ndim", "requires_grad", "shape")
}
_ABOUT |= {Tensor.dim, Tensor.element_size, Tensor.is_complex, Tensor.is_floating_point, Tensor.numel, Tensor.size}


class DecodedWeight(Tensor):
    """The weight of a :class:`FrozenLinear` as a plain ``[N, K]`` tensor in its compute dtype, decoded when it is read.

    Its shape, dtype and device are known without decoding. Every operation on its values decodes it anew, unless
    ``keep`` is true: then it is decoded once, and can be changed in place or through ``data``.
    """

    frozen: FrozenLinear
    keep: bool
    value: Tensor | None
    """What ``keep`` keeps; None as long as nothing has read or replaced it."""

    @classmethod
    def of(cls, frozen: FrozenLinear, *, keep: bool = False) -> DecodedWeight:
        """Return the weight of ``frozen``, not decoded yet."""
        nothing = torch.empty((), dtype=frozen.compute_dtype, device=frozen.weight_device)
        weight = nothing.expand(frozen.shape).as_subclass(cls)
        # Another object over the same bytes, which stays what it is while `as_plain` changes the layer itself.
        weight.frozen = object.__new__(type(frozen))
        weight.frozen.__dict__.update(frozen.__dict__)
        weight.keep, weight.value = keep, None
        return weight

    def read(self) -> Tensor:
        """Return the decoded weight, or what has replaced it."""
        if self.value is not None:
            return self.value
        if self.device.type == "meta":  # in a model that is only planned, there is nothing to decode
            value = torch.empty(self.shape, dtype=self.dtype, device="meta")
        else:
            value = self.frozen.decode(self.dtype)
        if self.keep:
            self.value = value
        return value

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ABOUT:
            return super().__torch_function__(func, types, args, kwargs)
        if func is _SET_DATA and isinstance(args[0], cls) and args[0].keep:
            args[0].value = args[1]
            return None
        args, kwargs = tree_map_only(cls, cls.read, (args, kwargs or {}))
        return func(*args, **kwargs)


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class FrozenLinear(FrozenModule, nn.Linear):
    """``y_MN = x_MK @ decode(bytes).T + bias_N``, computed in the dtype of ``x_MK`` (the autocast dtype under
    autocast).

    Its one encoded weight is called ``weight``; see :class:`arctic_plugins.frozen.module.FrozenModule`.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias; its dtype is ``dtype``.
        codec: how the weight is encoded.
        device: where to allocate; ``"meta"`` while a host is building the model.
        dtype: compute dtype, and dtype of the bias.
        name: the module's dotted name, for errors and for the placement.
        placement: where the bytes go when they arrive; ``None`` keeps them resident.
        until_encoded: see :meth:`FrozenModule.add_weight`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        codec: Codec,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        name: str = "the layer",
        placement: Placement | None = None,
        until_encoded: nn.Parameter | None = None,
    ) -> None:
        super().__init__(dtype)
        self.in_features, self.out_features = in_features, out_features
        weight = FrozenWeight((out_features, in_features), codec, f"{name}.weight", placement)
        self.add_weight("weight", weight, device=device, until_encoded=until_encoded)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, dtype=self.compute_dtype, device=device)) if bias else None
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        codec: Codec,
        *,
        device: torch.device | str | None = None,
        until_encoded: bool = False,
        **kwargs: Any,
    ) -> FrozenLinear:
        """Create a layer with the shape, dtype and bias of ``linear``.

        It is empty, on ``device`` (by default that of ``linear``), or still has its plain weight if ``until_encoded``.
        """
        device, dtype = device or linear.weight.device, linear.weight.dtype
        plain = nn.Parameter(linear.weight, requires_grad=False) if until_encoded else None
        has_bias = linear.bias is not None
        frozen = cls(
            linear.in_features,
            linear.out_features,
            has_bias,
            codec=codec,
            device=device,
            dtype=dtype,
            until_encoded=plain,
            **kwargs,
        )
        if has_bias:
            frozen.bias = linear.bias
        return frozen.train(linear.training)

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)`` of the encoded weight."""
        return self.out_features, self.in_features

    @property
    def codec(self) -> Codec:
        """How the weight is encoded."""
        return self.frozen["weight"].codec

    @property
    def handle(self) -> Handle | None:
        """Owner of the bytes, if a placement has them."""
        return self.frozen["weight"].handle

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return an ordinary layer with the decoded weight."""
        dtype = dtype or self.compute_dtype
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(self.decode(dtype), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    @contextmanager
    def as_plain(self, weight: Tensor, bias: nn.Parameter | None) -> Iterator[None]:
        """Be an ordinary ``nn.Linear`` with these parameters while the context lasts, for code that changes them.

        The layer's own parameters stay as they are.
        """
        stock, kind, decoded = self._parameters, type(self), self.__dict__.pop("weight", None)
        if not isinstance(weight, DecodedWeight):
            weight = nn.Parameter(weight, requires_grad=False)
        self._parameters = {"weight": weight, "bias": bias}  # type: ignore[dict-item]
        self.__class__ = nn.Linear  # type: ignore[assignment]
        try:
            yield
        finally:
            self.__class__, self._parameters = kind, stock
            if decoded is not None:
                self.__dict__["weight"] = decoded

    @contextmanager
    def as_decoded(self) -> Iterator[None]:
        """Give the layer a :class:`DecodedWeight` as ``weight`` while the context lasts, for code that reads it."""
        if "weight" in self.__dict__:
            yield
            return
        self.__dict__["weight"] = DecodedWeight.of(self)
        try:
            yield
        finally:
            del self.__dict__["weight"]

    def hold(self, buffers: Buffers, leaf: str = "weight") -> None:
        decoded = self.__dict__.pop("weight", None)  # a module cannot register a parameter that it has as an attribute
        try:
            super().hold(buffers, leaf)
        finally:
            if decoded is not None:
                self.__dict__["weight"] = decoded

    def forward(self, input: Tensor) -> Tensor:
        x_MK = input
        if torch.is_autocast_enabled(x_MK.device.type):
            x_MK = x_MK.to(torch.get_autocast_dtype(x_MK.device.type))
        y_MN = self.multiply(x_MK)
        return y_MN if self.bias is None else y_MN + self.bias.to(y_MN.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.bias is not None:
            self.compute_dtype = self.bias.dtype
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, codec={self.codec}{', placed' if self.handle is not None else ''}"
