"""The operators: their schemas, their fake and autograd functions, and their kernels on each device."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.kernels import CompiledKernels
from arctic_plugins_fp8.kernels import reference

__all__ = [
    "build",
    "decode",
    "describe",
    "encode",
    "grad_input",
    "grad_input_experts",
    "linear",
    "linear_bf16",
    "linear_experts",
    "linear_fp8",
    "load",
    "use",
    "widening_linear",
]

_library = torch.library.Library("arctic_fp8", "FRAGMENT")
_library.define(
    "encode(Tensor weight, Tensor(a!) codes, Tensor(b!) scale, int bits, float largest, int candidates) -> bool"
)
_library.define("decode(Tensor codes, Tensor scale, int bits, Tensor(a!) out) -> ()")
_library.define("linear(Tensor x, Tensor codes, Tensor scale, int bits) -> Tensor")
_library.define("linear_bf16(Tensor x, Tensor weight) -> Tensor")
_library.define("linear_fp8(Tensor x, Tensor codes, Tensor scale) -> Tensor")
_library.define("grad_input(Tensor grad, Tensor codes, Tensor scale, int bits, int in_features) -> Tensor")
_library.define("linear_experts(Tensor x, Tensor codes, Tensor scale, int bits, Tensor counts) -> Tensor")
_library.define(
    "grad_input_experts(Tensor grad, Tensor codes, Tensor scale, int bits, int in_features, Tensor counts) -> Tensor"
)
OPERATORS = ("encode", "decode", "linear", "linear_bf16", "grad_input", "linear_experts", "grad_input_experts")
for _name in OPERATORS:
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
_library.impl("linear_fp8", reference.linear_fp8, "CompositeExplicitAutograd")


def _fake_decode(codes: Tensor, scale: Tensor, bits: int, out: Tensor) -> None:
    return None


def _fake_linear(x: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _fake_linear_bf16(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linear_fp8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return _fake_linear(x, codes, scale, 8)


def _fake_grad_input(grad: Tensor, codes: Tensor, scale: Tensor, bits: int, in_features: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _fake_linear_experts(x: Tensor, codes: Tensor, scale: Tensor, bits: int, counts: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0] // len(counts)))


def _fake_grad_input_experts(
    grad: Tensor, codes: Tensor, scale: Tensor, bits: int, in_features: int, counts: Tensor
) -> Tensor:
    return grad.new_empty((grad.shape[0], in_features))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, ctx.bits = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(codes, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    codes, scale = ctx.saved_tensors
    return torch.ops.arctic_fp8.grad_input(grad, codes, scale, ctx.bits, ctx.in_features), None, None, None


def _save_bf16(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_bf16(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad @ ctx.saved_tensors[0].to(grad.dtype), None


def _save_fp8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, (*inputs, 8), output)


def _backward_fp8(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _backward(ctx, grad)[:3]


torch.library.register_fake("arctic_fp8::decode", _fake_decode, lib=_library)
torch.library.register_fake("arctic_fp8::linear", _fake_linear, lib=_library)
torch.library.register_fake("arctic_fp8::linear_bf16", _fake_linear_bf16, lib=_library)
torch.library.register_fake("arctic_fp8::linear_fp8", _fake_linear_fp8, lib=_library)
torch.library.register_fake("arctic_fp8::grad_input", _fake_grad_input, lib=_library)
torch.library.register_fake("arctic_fp8::linear_experts", _fake_linear_experts, lib=_library)
torch.library.register_fake("arctic_fp8::grad_input_experts", _fake_grad_input_experts, lib=_library)
torch.library.register_autograd("arctic_fp8::linear", _backward, setup_context=_save, lib=_library)
torch.library.register_autograd("arctic_fp8::linear_bf16", _backward_bf16, setup_context=_save_bf16, lib=_library)
torch.library.register_autograd("arctic_fp8::linear_fp8", _backward_fp8, setup_context=_save_fp8, lib=_library)


@cache
def _cuda(name: str) -> Callable[..., Any]:
    reference_: Callable[..., Any] = getattr(reference, name)
    if os.environ.get("ARCTIC_FP8_KERNELS") == "reference":
        return reference_
    try:
        from arctic_plugins_fp8.kernels import gpu, gpu_products
    except ImportError:  # torch's CUDA builds for Linux include Triton; others may not
        return reference_
    found: Callable[..., Any] = getattr(gpu if name == "decode" else gpu_products, name)
    return found


def _call_cuda(name: str, *args: Any) -> Any:
    return _cuda(name)(*args)


for _name in ("decode", "linear", "grad_input", "linear_experts", "grad_input_experts"):
    _library.impl(_name, partial(_call_cuda, _name), "CUDA")

_compiled = CompiledKernels("fp8", "ARCTIC_FP8_KERNELS", Path(__file__).parent / "csrc")
"""``ARCTIC_FP8_KERNELS=reference`` also disables Triton on CUDA; instruction sets have no effect there."""
_compiled.implement(OPERATORS)
build, load, use = _compiled.build, _compiled.load, _compiled.use


def describe() -> tuple[bool, str]:
    """Return whether compiled kernels are used on CPU, and a sentence about those of CPUs and NVIDIA GPUs."""
    if os.environ.get("ARCTIC_FP8_KERNELS") == "reference" or find_spec("triton") is None:
        gpu = "reference in torch"
    elif not torch.cuda.is_available():
        gpu = "Triton"
    else:
        from arctic_plugins_fp8.kernels.gpu_blocks import card

        measured = card(torch.device("cuda")).measured_on
        gpu = f"Triton, blocks {f'measured on {measured}' if measured else 'not measured on this kind of card'}"
    compiled, cpu = _compiled.describe()
    return compiled, f"CPU: {cpu}; GPU: {gpu}"


def widening_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return :data:`linear_bf16` if it is compiled, or None if it would widen the whole weight, as torch does."""
    return linear_bf16 if load() else None


encode = torch.ops.arctic_fp8.encode.default
"""``encode(weight [N, K], codes, scale, bits, largest, candidates) -> bool``: write the codes and scales of a
contiguous weight (float32, bfloat16 or float16).

A group's scale is the one of ``s * (1 + i / candidates)``, ``0 <= i < candidates``, with the smallest squared error,
where ``s`` is the group's largest magnitude divided by the format's largest value. Returns False if a magnitude is
above ``largest``, infinite or NaN.
"""
decode = torch.ops.arctic_fp8.decode.default
"""``decode(codes, scale, bits, out [N, K])``: write ``value(code) * scale``, rounded once from float32, to the
contiguous ``out``.

Magnitudes below 2**-126 may become zero in bfloat16.
"""
linear = torch.ops.arctic_fp8.linear.default
"""``linear(x [..., K], codes, scale, bits) -> [..., N]``: ``x @ decode(codes).T`` in the dtype of ``x``, accumulated in
float32. Differentiable.
"""
linear_bf16 = torch.ops.arctic_fp8.linear_bf16.default
"""``linear_bf16(x [..., K] in float32, weight [N, K] in bfloat16) -> [..., N]`` in float32: ``x @ weight.T`` without a
copy of the whole weight in float32. Differentiable with respect to ``x``."""
linear_fp8 = torch.ops.arctic_fp8.linear_fp8.default
"""``linear_fp8(x [..., K], codes [N, 1, K], scale [N, 1]) -> [..., N]``: like :data:`linear` with 8 bits, but each row
of ``x`` is first rounded to e4m3, scaled so that its largest magnitude is 448. Devices with FP8 units multiply in them.
The gradient is that of :data:`linear`."""
grad_input = torch.ops.arctic_fp8.grad_input.default
"""``grad_input(grad [..., N], codes, scale, bits, K) -> [..., K]``: ``grad @ decode(codes)``, the gradient of
:func:`linear`.
"""
linear_experts = torch.ops.arctic_fp8.linear_experts.default
"""``linear_experts(x [M, K], codes [E * N, ...], scale [E * N, G], bits, counts) -> [M, N]``: :data:`linear` of each
expert's rows with its N rows of the codes. The rows are sorted by expert; ``counts`` is int64 ``[E]`` on the device of
``x``, which is never waited for. Rows after those of the last expert become zero. Not differentiable by itself."""
grad_input_experts = torch.ops.arctic_fp8.grad_input_experts.default
"""``grad_input_experts(grad [M, N], codes, scale, bits, K, counts) -> [M, K]``: the gradient of
:func:`linear_experts`.
"""
