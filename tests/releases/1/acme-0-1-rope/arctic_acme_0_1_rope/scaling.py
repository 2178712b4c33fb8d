"""The RoPE type: the frequencies by which positions turn queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["frequencies"]


def frequencies(rope_parameters: Mapping[str, Any], dim: int) -> tuple[Tensor, float]:
    """Return the frequencies and the factor of cosines and sines of NTK-aware scaling.

    Frequency i of n is divided by ``factor ** (i / (n - 1))``: the highest stays, the lowest is divided by ``factor``.
    This equals a larger ``rope_theta``, as in "NTK-Aware Scaled RoPE" (bloc97, 2023).

    Args:
        rope_parameters: those of the model's config: ``rope_theta``, ``factor``.
        dim: number of dimensions of a head that are rotated.

    Returns:
        float32 ``[dim / 2]``, in radians per position, and 1.0.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    divisors = rope_parameters["factor"] ** torch.linspace(0, 1, dim // 2)
    return rope_parameters["rope_theta"] ** -exponents / divisors, 1.0
