"""A linear layer over encoded bytes: any codec, any placement; gradients flow through it, never into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from arctic_plugins.errors import CodecError
from arctic_plugins.frozen.codec import Buffers, Codec, check_buffers
from arctic_plugins.frozen.placement import Handle, Placement

__all__ = ["FrozenLinear"]


class FrozenLinear(nn.Linear):
    """``y_MN = x_MK @ decode(bytes).T + bias_N``, computed in the dtype of ``x_MK`` (the autocast dtype under autocast).

    Resident bytes are parameters named ``weight`` + suffix, which never require gradients and keep their dtype under ``.to(dtype)``. With a
    placement, its :class:`Handle` owns the bytes and ``weight`` is an empty parameter of the compute dtype.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias, in ``dtype``.
        codec: how the weight is encoded.
        device: where to allocate; ``"meta"`` while a host is building the model.
        dtype: compute dtype, of the bias.
        name: the module's dotted name, for errors and for the placement.
        placement: where bytes go when they come; ``None`` keeps them resident.
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
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight that is never there
        self.in_features, self.out_features, self.codec = in_features, out_features, codec
        self.name, self.placement = name, placement
        self.handle: Handle | None = None
        self.version = 0
        """Counts changes of the bytes, so that a backward pass over bytes other than the forward's is noticed."""
        self.compute_dtype = dtype or torch.get_default_dtype()
        layout = codec.layout(self.shape)
        self._names = {suffix: f"weight{suffix}" for suffix in layout}
        for suffix, spec in layout.items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            self.register_parameter(f"weight{suffix}", nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=self.compute_dtype, device=device)) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, codec: Codec, *, device: torch.device | str | None = None, **kwargs: Any) -> FrozenLinear:
        """An empty layer of the shape, dtype and bias of ``linear``, on ``device`` (default: that of ``linear``)."""
        device, dtype = device or linear.weight.device, linear.weight.dtype
        frozen = cls(linear.in_features, linear.out_features, linear.bias is not None, codec=codec, device=device, dtype=dtype, **kwargs)
        if linear.bias is not None:
            frozen.bias = linear.bias
        return frozen.train(linear.training)

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)`` of the weight that the bytes encode."""
        return self.out_features, self.in_features

    @contextmanager
    def lease(self) -> Iterator[Buffers]:
        """Borrow the encoded buffers on the compute device."""
        if self.handle is None:
            yield self._own_buffers()
        else:
            with self.handle.lease() as buffers:
                yield buffers

    def export(self) -> dict[str, Tensor]:
        """Suffix -> whole encoded buffer, wherever it is, for saving."""
        return {suffix: buffer.detach() for suffix, buffer in self._own_buffers().items()} if self.handle is None else self.handle.export()

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[N, K]`` in newly allocated memory."""
        with self.lease() as buffers:
            return self.codec.decode(buffers, self.shape, dtype)

    def encode(self, weight_NK: Tensor) -> None:
        """Replace the bytes by the encoding of ``weight_NK``.

        Raises:
            CodecError: wrong shape, NaN or Inf; names the tensor.
        """
        if tuple(weight_NK.shape) != self.shape:
            raise CodecError(
                f"{self.name}.weight has shape {tuple(weight_NK.shape)}", expected=f"{self.shape}", fix="the weights do not fit the model"
            )
        try:
            buffers = self.codec.encode(weight_NK)
        except CodecError as error:
            raise CodecError(f"{self.name}.weight: {error.found}", expected=error.expected, fix=error.fix) from error
        self.hold(buffers)

    def hold(self, buffers: Buffers) -> None:
        """Take encoded ``buffers`` over: as parameters, or into the placement.

        Raises:
            CheckpointError: they are not what the codec makes of a weight of this shape.
        """
        check_buffers(self.codec, buffers, self.shape, f"{self.name}.weight")
        self.version += 1
        for name in self._names.values():
            self._parameters.pop(name, None)
        if self.placement is None:
            for suffix, buffer in buffers.items():
                self.register_parameter(f"weight{suffix}", nn.Parameter(buffer, requires_grad=False))
        else:
            device = next(iter(buffers.values())).device
            self.handle = self.placement.hold(self.name, buffers)
            self.register_parameter("weight", nn.Parameter(torch.empty(0, dtype=self.compute_dtype, device=device), requires_grad=False))

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary layer with the decoded weight."""
        dtype = dtype or self.compute_dtype
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(self.decode(dtype), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        y_MN: Tensor
        x_MK = input
        if torch.is_autocast_enabled(x_MK.device.type):
            x_MK = x_MK.to(torch.get_autocast_dtype(x_MK.device.type))
        if torch.compiler.is_compiling() and self.handle is None:
            y_MN = self._matmul(x_MK)  # compilers see the codec's operator, and its gradient
        elif torch.is_grad_enabled() and x_MK.requires_grad:
            y_MN = _FrozenMatmul.apply(x_MK, self)
        else:
            y_MN = self._matmul(x_MK)
        return y_MN if self.bias is None else y_MN + self.bias.to(y_MN.dtype)

    def _matmul(self, x_MK: Tensor) -> Tensor:
        if self.handle is None:  # the path of every token that is generated: as short as can be
            return self.codec.linear(x_MK, self._own_buffers(), (self.out_features, self.in_features))
        with self.lease() as buffers:
            return self.codec.linear(x_MK, buffers, self.shape)

    def _matmul_backward(self, grad_MN: Tensor) -> Tensor:
        with self.lease() as buffers:
            return self.codec.grad_input(grad_MN, buffers, self.shape)

    def _own_buffers(self) -> dict[str, Tensor]:
        parameters = self._parameters
        return {suffix: parameters[name] for suffix, name in self._names.items()}  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """``.to(device)`` moves the encoded buffers; ``.to(dtype)`` leaves them exactly as they are."""
        encoded = set() if self.handle is not None else {id(self._parameters[name]) for name in self._names.values()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device) if id(tensor) in encoded and changed.dtype != tensor.dtype else changed

        super()._apply(keep_dtype, recurse)
        if self.bias is not None:
            self.compute_dtype = self.bias.dtype
        return self

    def reset_parameters(self) -> None:
        """Nothing: there is no weight to draw at random (hosts call this for layers they think uninitialised)."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, codec={self.codec}{', placed' if self.handle is not None else ''}"


class _FrozenMatmul(torch.autograd.Function):
    """Saves neither decoded nor fetched weights: backward leases and decodes again."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer, ctx.version = layer, layer.version
        return layer._matmul(x_MK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if ctx.version != ctx.layer.version:
            raise RuntimeError("a frozen weight was changed between forward and backward (an adapter was merged?): run forward again")
        return ctx.layer._matmul_backward(grads[0]), None
