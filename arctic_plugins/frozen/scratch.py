"""Memory to decode into. It is reused, because with fresh memory page faults cost more than the arithmetic."""

from __future__ import annotations

import threading
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["take_scratch"]


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[Any, ...], Tensor] = {}


_scratch = _Scratch()


def take_scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return a tensor of ``shape`` to overwrite. It is valid until the next call in this thread.

    There is one buffer per (device, stream, dtype), as large as the largest request so far. Return None while a
    compiler traces, because compilers plan memory themselves, and while a CUDA graph is captured, because a graph keeps
    the address of a buffer that a larger request would replace; memory allocated during the capture belongs to the
    graph.
    """
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key, size = (device, stream, dtype), prod(shape)
    buffer = _scratch.buffers.get(key)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # an inference tensor could not be written to while training
            buffer = _scratch.buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return buffer[:size].view(shape)
