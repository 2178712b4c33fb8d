"""A linear layer over encoded bytes, for any codec and placement; gradients flow through it, never into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from arctic_plugins.errors import ConfigError
from arctic_plugins.frozen.codec import Codec
from arctic_plugins.frozen.module import FrozenModule, FrozenWeight
from arctic_plugins.frozen.placement import Handle, Placement

__all__ = ["FrozenLinear"]


_ABOUT = {
    getattr(Tensor, name).__get__
    for name in ("device", "dtype", "is_cuda", "is_meta", "layout", "ndim", "requires_grad", "shape")
}
_ABOUT |= {Tensor.dim, Tensor.element_size, Tensor.is_complex, Tensor.is_floating_point, Tensor.numel, Tensor.size}


class _Unread(Tensor):
    """A tensor with a shape, a dtype and a device, but no values."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ABOUT:
            raise ConfigError(
                "the adapter reads the weight of a layer whose weight is encoded",
                expected="an adapter that only uses the layer's output",
                fix="train another kind of adapter, or load plain weights",
            )
        return super().__torch_function__(func, types, args, kwargs)


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
        """Use ``weight`` and ``bias`` as the parameters while the context lasts, for code that reads or changes them.

        The layer cannot compute meanwhile. Its own parameters stay as they are.
        """
        stock = self._parameters
        self._parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": bias}
        try:
            yield
        finally:
            self._parameters = stock

    @contextmanager
    def as_unread(self) -> Iterator[None]:
        """Give the layer a ``weight`` with the shape and dtype of the decoded weight while the context lasts.

        Reading its values raises ConfigError.
        """
        if "weight" in self.__dict__:
            yield
            return
        nothing = torch.empty((), dtype=self.compute_dtype, device=self.weight_device)
        self.__dict__["weight"] = nothing.expand(self.shape).as_subclass(_Unread)
        try:
            yield
        finally:
            del self.__dict__["weight"]

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
