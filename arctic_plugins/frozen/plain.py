"""The codec that changes nothing: for weights that no codec encodes and that placements move."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import CodecError
from arctic_plugins.frozen.codec import Buffers, Codec, TensorSpec

__all__ = ["PlainCodec"]


@cache
def _widening_linear() -> Any:
    return process_registry().load_widening_linear()


@dataclasses.dataclass(frozen=True)
class PlainCodec(Codec):
    """The weight as it is, in ``dtype`` (the name of a torch dtype).

    It exists only in memory: checkpoints contain such a weight under its own name and in its own shape.
    """

    type: ClassVar[str] = "plain"

    dtype: str = "bfloat16"
    """The name of the dtype."""

    def __post_init__(self) -> None:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise CodecError(f"dtype is {self.dtype!r}", expected="the name of a torch dtype")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {"": TensorSpec(shape, self.torch_dtype, k_dim=len(shape) - 1)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return {"": weight.detach().to(self.torch_dtype).contiguous()}

    def decode(
        self, buffers: Buffers, shape: tuple[int, ...], dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Tensor:
        return buffers[""].to(dtype, copy=True) if out is None else out.copy_(buffers[""])

    def linear(self, x: Tensor, buffers: Buffers, shape: tuple[int, int]) -> Tensor:
        weight = buffers[""]
        if (
            x.dtype == torch.float32
            and weight.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and (product := _widening_linear())
        ):
            y: Tensor = product(x, weight)
            return y
        return torch.nn.functional.linear(x, weight.to(x.dtype))

    def grad_input(self, grad: Tensor, buffers: Buffers, shape: tuple[int, int]) -> Tensor:
        return grad @ buffers[""].to(grad.dtype)
