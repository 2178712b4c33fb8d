"""Kernels of the ``fp8`` codec, as torch operators: ``torch.ops.arctic_fp8.{encode, decode, linear, linear_fp8,
grad_input}``, for the rows of many experts ``linear_experts`` and ``grad_input_experts``, and for plain weights in
bfloat16 ``linear_bf16``.

The dispatcher of torch is the table of kernels: CPU has the compiled ones (``csrc``), CUDA decoding (``gpu``) and
products (``gpu_products``) in Triton; what is missing, and every other device, has the reference in torch
(``reference``). All take an encoded weight as ``codes uint8 [N, G, g * bits / 8]`` and ``scale float32 [N, G]``.
"""

from arctic_plugins_fp8.kernels.ops import (
    decode,
    describe,
    encode,
    grad_input,
    grad_input_experts,
    linear,
    linear_bf16,
    linear_experts,
    linear_fp8,
    use,
    widening_linear,
)

__all__ = [
    "decode",
    "describe",
    "encode",
    "grad_input",
    "grad_input_experts",
    "linear",
    "linear_bf16",
    "linear_experts",
    "linear_fp8",
    "use",
    "widening_linear",
]
