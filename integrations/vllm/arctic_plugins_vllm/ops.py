"""A codec's linear, and the experts of a mixture, as opaque operators that a compiler does not trace.

vLLM compiles models by default. On CPU, the code that Inductor (torch 2.13) generated for fp8 in plain torch took about
three times as long as the codec's own blocks. On other devices nothing was measured, and the codec is traced. A codec
that implements its own linear is called directly: it is an operator already.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from arctic_plugins.frozen import Codec, codec_from_dict, codec_to_dict
from arctic_plugins.frozen.experts import in_blocks, mix_experts
from arctic_plugins_vllm.compat import activate_experts

__all__ = ["codec_experts", "codec_linear", "codec_text"]


def codec_text(codec: Codec) -> str:
    """Return ``codec`` as a string, which can be a constant of a graph."""
    return json.dumps(codec_to_dict(codec), sort_keys=True)


@cache
def _codec(text: str) -> Codec:
    return codec_from_dict(json.loads(text))


def codec_linear(x: Tensor, buffers: dict[str, Tensor], codec: Codec, text: str, shape: tuple[int, int]) -> Tensor:
    """Return ``x [..., K] @ decode(buffers).T`` in the dtype of ``x``; ``text`` is ``codec_text(codec)``."""
    if torch.compiler.is_compiling() and x.device.type == "cpu" and type(codec).linear is Codec.linear:
        y: Tensor = torch.ops.arctic_plugins.codec_linear(x, list(buffers.values()), list(buffers), text, list(shape))
        return y
    return codec.linear(x, buffers, shape)


def _linear(x: Tensor, buffers: list[Tensor], suffixes: list[str], text: str, shape: list[int]) -> Tensor:
    named, size = dict(zip(suffixes, buffers, strict=True)), (shape[0], shape[1])
    return _codec(text).linear(x, named, size)


def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], args[-1][0]))


def codec_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: dict[str, Tensor],
    down: dict[str, Tensor],
    texts: tuple[str, str],
    shapes: tuple[tuple[int, int, int], tuple[int, int, int]],
    activation: str,
) -> Tensor:
    """Compute :func:`arctic_plugins.frozen.experts.mix_experts` over encoded weights, as one operator.

    It cannot be traced, because the number of tokens per expert depends on the data.

    Args:
        x, index, weights: as in ``mix_experts``.
        up, down: buffers of the two weights.
        texts: :func:`codec_text` of their codecs.
        shapes: shapes of the weights, ``(E, 2I, K)`` and ``(E, K, I)``.
        activation: the result of :func:`arctic_plugins_vllm.compat.expert_activation`, as JSON.
    """
    operator = torch.ops.arctic_plugins.codec_experts
    y: Tensor = operator(
        x,
        index,
        weights,
        list(up.values()),
        list(up),
        list(shapes[0]),
        texts[0],
        list(down.values()),
        list(down),
        list(shapes[1]),
        texts[1],
        activation,
    )
    return y


def _experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: list[Tensor],
    up_suffixes: list[str],
    up_shape: list[int],
    up_text: str,
    down: list[Tensor],
    down_suffixes: list[str],
    down_shape: list[int],
    down_text: str,
    activation: str,
) -> Tensor:
    def product(
        buffers: list[Tensor], suffixes: list[str], shape: list[int], text: str
    ) -> Callable[[Tensor, Tensor], Tensor]:
        named = dict(zip(suffixes, buffers, strict=True))
        return lambda rows, counts: _codec(text).linear_experts(rows, named, tuple(shape), counts)  # type: ignore[arg-type]

    up_product, down_product = (
        product(up, up_suffixes, up_shape, up_text),
        product(down, down_suffixes, down_shape, down_text),
    )
    act = json.loads(activation)

    def products(rows: Tensor, counts: Tensor) -> Tensor:
        return down_product(activate_experts(act, up_product(rows, counts)), counts)

    return mix_experts(
        x, index, weights, up_shape[0], lambda rows, counts: in_blocks(products, rows, counts, up_shape[1])
    )


def _experts_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("arctic_plugins", "FRAGMENT")
_library.define("codec_linear(Tensor x, Tensor[] buffers, str[] suffixes, str text, int[] shape) -> Tensor")
_library.impl("codec_linear", _linear, "CPU")
torch.library.register_fake("arctic_plugins::codec_linear", _fake, lib=_library)
_library.define(
    "codec_experts(Tensor x, Tensor index, Tensor weights, Tensor[] up, str[] up_suffixes, int[] up_shape, str "
    "up_text, "
    "Tensor[] down, str[] down_suffixes, int[] down_shape, str down_text, str activation) -> Tensor"
)
_library.impl("codec_experts", _experts, "CompositeExplicitAutograd")
torch.library.register_fake("arctic_plugins::codec_experts", _experts_fake, lib=_library)
