"""A codec's linear as one operator that a compiler does not look into.

vLLM compiles models by default. On CPU, what Inductor of torch 2.13 made of fp8 in plain torch took about three times as long as the codec's own
blocks. On other devices nothing was measured, and the codec is traced. A codec with a linear of its own is left to it: that is an operator already.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.frozen import Codec, codec_from_dict, codec_to_dict

__all__ = ["codec_linear", "codec_text"]


def codec_text(codec: Codec) -> str:
    """``codec`` as a constant of a graph."""
    return json.dumps(codec_to_dict(codec), sort_keys=True)


@cache
def _codec(text: str) -> Codec:
    return codec_from_dict(json.loads(text))


def codec_linear(x: Tensor, buffers: dict[str, Tensor], codec: Codec, text: str, shape: tuple[int, int]) -> Tensor:
    """``x [..., K] @ decode(buffers).T`` in the dtype of ``x``; ``text`` is the :func:`codec_text` of ``codec``."""
    if torch.compiler.is_compiling() and x.device.type == "cpu" and type(codec).linear is Codec.linear:
        y: Tensor = torch.ops.arctic_plugins.codec_linear(x, list(buffers.values()), list(buffers), text, list(shape))
        return y
    return codec.linear(x, buffers, shape)


def _linear(x: Tensor, buffers: list[Tensor], suffixes: list[str], text: str, shape: list[int]) -> Tensor:
    named, size = dict(zip(suffixes, buffers, strict=True)), (shape[0], shape[1])
    return _codec(text).linear(x, named, size)


def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], args[-1][0]))


_library = torch.library.Library("arctic_plugins", "FRAGMENT")
_library.define("codec_linear(Tensor x, Tensor[] buffers, str[] suffixes, str text, int[] shape) -> Tensor")
_library.impl("codec_linear", _linear, "CPU")
torch.library.register_fake("arctic_plugins::codec_linear", _fake, lib=_library)
