"""Kernels of the ``fp8`` codec, as torch operators.

These are ``torch.ops.arctic_fp8.{encode, decode, linear, linear_fp8, grad_input}``, ``linear_experts`` and
``grad_input_experts`` for the rows of many experts, and ``linear_bf16`` for plain weights in bfloat16.

torch's dispatcher selects the kernel: CPU has compiled kernels (``csrc``), and CUDA has decoding (``gpu``) and products
(``gpu_products``) in Triton. All other operators and devices use the reference in torch (``reference``). An encoded
weight is passed as ``codes uint8 [N, G, g * bits / 8]`` and ``scale float32 [N, G]``.
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
