"""Embeddings and output heads in vLLM, which stay plain, in the checkpoint's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arctic_plugins.compute import dtype_name
from arctic_plugins.frozen import PlainCodec
from arctic_plugins_vllm.compat import UnquantizedEmbeddingMethod

__all__ = ["StoredEmbeddingMethod"]


class StoredEmbeddingMethod(UnquantizedEmbeddingMethod):
    """Method that keeps a plain weight in the dtype ``stored`` if the model computes in a wider dtype.

    This halves the bytes without changing the numbers. All of a head is read for every token, and in float32 it takes a
    third of SmolLM2-135M's bytes. Read in vllm 0.32.0: heads share their embedding's parameter through ``tie_weights``,
    and logits are not part of the compiled graph.
    """

    def __init__(self, stored: torch.dtype) -> None:
        self.codec = PlainCodec(dtype_name(stored))

    def create_weights(self, layer: Any, *args: Any, params_dtype: torch.dtype, **extra: Any) -> None:
        layer.arctic_dtype = params_dtype
        super().create_weights(layer, *args, params_dtype=self.codec.torch_dtype, **extra)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Do nothing: vLLM would choose a product in the weight's dtype."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.codec.linear(x, {"": layer.weight}, tuple(layer.weight.shape))
        return y if bias is None else y + bias

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return super().embedding(layer, input_).to(layer.arctic_dtype)
