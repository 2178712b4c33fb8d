"""The operators: their schemas, what compilers and autograd need of them, and which kernels stand behind them on each device."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.errors import ConfigError
from arctic_plugins_fp8.kernels import build, reference

__all__ = ["decode", "describe", "encode", "grad_input", "linear", "use"]

logger = logging.getLogger(__name__)

VARIABLE = "ARCTIC_FP8_KERNELS"
"""Environment variable: ``amx``, ``avx512_bf16``, ``avx512`` or ``reference`` instead of the best that the processor has."""

_library = torch.library.Library("arctic_fp8", "FRAGMENT")
_library.define("encode(Tensor weight, Tensor(a!) codes, Tensor(b!) scale, int bits, float largest) -> bool")
_library.define("decode(Tensor codes, Tensor scale, int bits, Tensor(a!) out) -> ()")
_library.define("linear(Tensor x, Tensor codes, Tensor scale, int bits) -> Tensor")
_library.define("grad_input(Tensor grad, Tensor codes, Tensor scale, int bits, int in_features) -> Tensor")
for _name in ("encode", "decode", "linear", "grad_input"):
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _fake_decode(codes: Tensor, scale: Tensor, bits: int, out: Tensor) -> None:
    return None


def _fake_linear(x: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


def _fake_grad_input(grad: Tensor, codes: Tensor, scale: Tensor, bits: int, in_features: int) -> Tensor:
    return grad.new_empty((grad.shape[0], in_features))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, ctx.bits = inputs
    ctx.in_features = x.shape[1]
    ctx.save_for_backward(codes, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    codes, scale = ctx.saved_tensors
    return grad_input(grad.contiguous(), codes, scale, ctx.bits, ctx.in_features), None, None, None


torch.library.register_fake("arctic_fp8::decode", _fake_decode, lib=_library)
torch.library.register_fake("arctic_fp8::linear", _fake_linear, lib=_library)
torch.library.register_fake("arctic_fp8::grad_input", _fake_grad_input, lib=_library)
torch.library.register_autograd("arctic_fp8::linear", _backward, setup_context=_save, lib=_library)


@cache
def _load() -> str:
    """Load the compiled CPU kernels, building them if this is the first time, and return the instruction set in use; "" when there are none."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "reference" or not build.is_supported():
        return ""
    try:
        torch.ops.load_library(build.library())
    except (build.BuildError, OSError) as error:
        logger.warning("the CPU kernels of fp8 could not be built, slower ones in torch are used: %s", error)
        return ""
    found: str = torch.ops.arctic_fp8.use(wanted)
    if wanted and not found:
        raise ConfigError(f"{VARIABLE}={wanted}", expected="instructions that this processor has", fix="unset it")
    return found


def _compiled() -> str:
    return _load()  # not the cached function itself: compilers would look into that


torch.compiler.assume_constant_result(_compiled)  # they call it while they trace


def use(instruction_set: str = "") -> str:
    """Choose the CPU kernels by name (``amx``, ``avx512_bf16``, ``avx512``), or the best; returns the name, or "" when it cannot be had."""
    return torch.ops.arctic_fp8.use(instruction_set) if _compiled() else ""


def describe() -> tuple[bool, str]:
    """Whether compiled kernels are used on CPU, and a sentence about it."""
    if found := _compiled():
        return True, f"CPU: compiled, {found} instructions"
    return False, f"CPU: reference in torch ({build.obstacle() or f'{VARIABLE} is set'})"


def encode(weight_NK: Tensor, codes: Tensor, scale_NG: Tensor, bits: int, largest: float) -> bool:
    """Write the codes and scales of ``weight_NK`` (float32, bfloat16 or float16, contiguous).

    Returns:
        False when a magnitude is beyond ``largest``, infinite or NaN.
    """
    _compiled()
    return torch.ops.arctic_fp8.encode(weight_NK, codes, scale_NG, bits, largest)


def decode(codes: Tensor, scale_NG: Tensor, bits: int, out_NK: Tensor) -> None:
    """Write ``value(code) * scale``, rounded once from float32, to ``out_NK`` (float32, bfloat16 or float16, contiguous).

    What is below 2**-126 may become zero in bfloat16.
    """
    _compiled()
    torch.ops.arctic_fp8.decode(codes, scale_NG, bits, out_NK)


def linear(x_MK: Tensor, codes: Tensor, scale_NG: Tensor, bits: int) -> Tensor:
    """``x_MK @ decode(codes).T``, in the dtype of ``x_MK``; sums are float32. Differentiable in ``x_MK``."""
    _compiled()
    return torch.ops.arctic_fp8.linear(x_MK, codes, scale_NG, bits)


def grad_input(grad_MN: Tensor, codes: Tensor, scale_NG: Tensor, bits: int, in_features: int) -> Tensor:
    """``grad_MN @ decode(codes)``: the gradient of :func:`linear`."""
    _compiled()
    return torch.ops.arctic_fp8.grad_input(grad_MN, codes, scale_NG, bits, in_features)
