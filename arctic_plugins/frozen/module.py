"""Base of layers over encoded weights: their bytes are parameters or elsewhere, and products never save them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

import torch
from torch import Tensor, nn

from arctic_plugins.errors import CodecError, named
from arctic_plugins.frozen.codec import Buffers, Codec, check_buffers
from arctic_plugins.frozen.placement import Handle, Placement

__all__ = ["FrozenModule", "FrozenWeight"]


_versions = count(1)


@dataclass(eq=False)
class FrozenWeight:
    """An encoded weight of a module, without its bytes."""

    shape: tuple[int, ...]
    """``(N, K)``, or ``(E, N, K)`` for one matrix per expert."""
    codec: Codec
    """How it is encoded."""
    name: str
    """The parameter's dotted name in the model, for errors and for the placement."""
    placement: Placement | None = None
    """Where the bytes go when they arrive; None keeps them resident."""
    handle: Handle | None = None
    """Owner of the bytes, once a placement has taken them."""
    version: int = 0
    """Changes with the bytes, so that a backward pass over other bytes than the forward pass is detected."""
    parameters: dict[str, str] | None = None
    """Suffix -> name of the module's parameter that holds this buffer; None until there are bytes."""


class FrozenModule(nn.Module):
    """A module with encoded weights, each under the name (``leaf``) that the plain weight would have.

    Resident bytes are parameters named leaf + suffix, which never require gradients and keep their dtype under
    ``.to(dtype)``. With a placement, its :class:`Handle` owns the bytes, and the parameter ``leaf`` is empty and has
    the compute dtype. Subclasses call :meth:`add_weight`.
    """

    compute_dtype: torch.dtype
    """The dtype of products; that of ``.to(dtype)`` and of parameters that are not encoded."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)  # that of nn.Linear, later in the MRO, would allocate a weight that is never used
        self.compute_dtype = dtype or torch.get_default_dtype()
        self.frozen: dict[str, FrozenWeight] = {}

    def add_weight(
        self,
        leaf: str,
        weight: FrozenWeight,
        *,
        device: torch.device | str | None = None,
        until_encoded: nn.Parameter | None = None,
    ) -> None:
        """Add an encoded weight.

        Args:
            leaf: its name in this module.
            weight: its description.
            device: where to allocate its empty buffers; ``"meta"`` while a host is building the model.
            until_encoded: the plain parameter to use instead of buffers until :meth:`encode` replaces it. Hosts cast
                what they load to its dtype.

        Raises:
            CodecError: the codec does not encode weights of this shape.
        """
        self.frozen[leaf] = weight
        layout = weight.codec.layout(weight.shape)
        if until_encoded is not None:
            self.register_parameter(leaf, until_encoded)
        else:
            self._set_resident(
                leaf,
                {suffix: torch.empty(spec.shape, dtype=spec.dtype, device=device) for suffix, spec in layout.items()},
            )

    @property
    def weight_device(self) -> torch.device:
        """Where the bytes are, or where the placement brings them."""
        return next(parameter.device for parameter in self._parameters.values() if parameter is not None)

    @contextmanager
    def lease(self, leaf: str = "weight") -> Iterator[Buffers]:
        """Borrow the encoded buffers on the compute device."""
        weight = self.frozen[leaf]
        if weight.handle is None:
            yield self._resident(weight)
        else:
            with weight.handle.lease(self._parameters[leaf].device) as buffers:  # type: ignore[union-attr]
                yield buffers

    def export(self, leaf: str = "weight") -> dict[str, Tensor]:
        """Return suffix -> whole encoded buffer, wherever it is, for saving."""
        weight = self.frozen[leaf]
        if weight.handle is not None:
            return weight.handle.export()
        return {suffix: buffer.detach() for suffix, buffer in self._resident(weight).items()}

    def decode(self, dtype: torch.dtype = torch.float32, leaf: str = "weight") -> Tensor:
        """Return the weight in newly allocated memory."""
        with self.lease(leaf) as buffers:
            return self.frozen[leaf].codec.decode(buffers, self.frozen[leaf].shape, dtype)

    def encode(self, plain: Tensor, leaf: str = "weight") -> None:
        """Replace the bytes with the encoding of ``plain``.

        Raises:
            CodecError: wrong shape, NaN or Inf; the message names the tensor.
        """
        weight = self.frozen[leaf]
        if tuple(plain.shape) != weight.shape:
            raise CodecError(
                f"{weight.name} has shape {tuple(plain.shape)}",
                expected=f"{weight.shape}",
                fix="the weights do not match the model",
            )
        with named(weight.name, CodecError):
            buffers = weight.codec.encode(plain)
        self.hold(buffers, leaf)

    def hold(self, buffers: Buffers, leaf: str = "weight") -> None:
        """Take over encoded ``buffers``, as parameters or into the placement.

        Raises:
            CheckpointError: they are not what the codec makes of a weight of this shape.
        """
        weight = self.frozen[leaf]
        check_buffers(weight.codec, buffers, weight.shape, weight.name)
        weight.version = next(_versions)
        for name in (weight.parameters or {"": leaf}).values():
            self._parameters.pop(name, None)
        if weight.placement is None:
            self._set_resident(leaf, buffers)
        else:
            device = next(iter(buffers.values())).device
            weight.handle = weight.placement.hold(weight.name, buffers)
            self.register_parameter(
                leaf, nn.Parameter(torch.empty(0, dtype=self.compute_dtype, device=device), requires_grad=False)
            )

    def multiply(self, x_MK: Tensor, leaf: str = "weight", counts: Tensor | None = None) -> Tensor:
        """Return ``x_MK @ decode(bytes).T``, in the dtype of ``x_MK``. Gradients flow through it, never into the bytes.

        Args:
            x_MK: ``[..., K]``; for a weight of experts ``[M, K]``, sorted by expert.
            leaf: which weight.
            counts: for a weight of experts, int64 ``[E]``, the number of rows of each. Only experts with rows are
                decoded.
        """
        if (
            torch.is_grad_enabled()
            and x_MK.requires_grad
            and not (torch.compiler.is_compiling() and self.frozen[leaf].handle is None)
        ):
            y_MN: Tensor = _FrozenMatmul.apply(x_MK, self, leaf, counts)
            return y_MN
        return self._product(
            x_MK, leaf, counts
        )  # also while compiling, so that compilers see the codec's operator and its gradient

    def _product(self, x_MK: Tensor, leaf: str, counts: Tensor | None) -> Tensor:
        weight = self.frozen[leaf]
        if counts is None and weight.handle is None:  # the path of every generated token: as short as possible
            return weight.codec.linear(x_MK, self._resident(weight), weight.shape)  # type: ignore[arg-type]
        with self.lease(leaf) as buffers:
            if counts is None:
                return weight.codec.linear(x_MK, buffers, weight.shape)  # type: ignore[arg-type]
            return weight.codec.linear_experts(x_MK, buffers, weight.shape, counts)  # type: ignore[arg-type]

    def _gradient(self, grad_MN: Tensor, leaf: str, counts: Tensor | None) -> Tensor:
        weight = self.frozen[leaf]
        with self.lease(leaf) as buffers:
            if counts is None:
                return weight.codec.grad_input(grad_MN, buffers, weight.shape)  # type: ignore[arg-type]
            return weight.codec.grad_input_experts(grad_MN, buffers, weight.shape, counts)  # type: ignore[arg-type]

    def _resident(self, weight: FrozenWeight) -> dict[str, Tensor]:
        parameters = self._parameters
        return {suffix: parameters[name] for suffix, name in weight.parameters.items()}  # type: ignore[union-attr, misc]

    def _set_resident(self, leaf: str, buffers: Buffers) -> None:
        self.frozen[leaf].parameters = {suffix: f"{leaf}{suffix}" for suffix in buffers}
        for suffix, buffer in buffers.items():
            self.register_parameter(f"{leaf}{suffix}", nn.Parameter(buffer, requires_grad=False))

    def encoded(self) -> list[nn.Parameter]:
        """Return the parameters that hold encoded buffers.

        A weight that a placement has, or that is not encoded yet, has none.
        """
        resident = [
            weight for weight in self.frozen.values() if weight.handle is None and weight.parameters is not None
        ]
        return [parameter for weight in resident for parameter in self._resident(weight).values()]  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the encoded buffers in ``.to(device)``; leave them exactly as they are in ``.to(dtype)``."""
        encoded = {id(parameter) for parameter in self.encoded()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device) if id(tensor) in encoded and changed.dtype != tensor.dtype else changed

        super()._apply(keep_dtype, recurse)
        return self

    def reset_parameters(self) -> None:
        """Do nothing: there is no weight to initialize (hosts call this for layers that they think uninitialized)."""


class _FrozenMatmul(torch.autograd.Function):
    """A product that saves neither decoded nor fetched weights: backward leases and decodes again."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, module: FrozenModule, leaf: str, counts: Tensor | None) -> Tensor:
        ctx.module, ctx.leaf, ctx.counts, ctx.version = module, leaf, counts, module.frozen[leaf].version
        return module._product(x_MK, leaf, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.version != ctx.module.frozen[ctx.leaf].version:
            raise RuntimeError(
                "a frozen weight was changed between forward and backward (an adapter was merged?): run forward again"
            )
        return ctx.module._gradient(grads[0], ctx.leaf, ctx.counts), None, None, None
