"""Options of the ``longseq`` plugin."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from arctic_plugins import THIS_MACHINE, PluginConfig

__all__ = ["LongSeqConfig"]


class LongSeqConfig(PluginConfig):
    """Options under ``longseq:`` in a recipe."""

    tiled_loss: bool = True
    """Compute the loss from the hidden states, a few tokens at a time, forward and backward; the logits of all tokens
    never exist at once.
    """
    loss_tile: Annotated[int, Field(ge=1)] | None = None
    """Number of tokens whose logits exist at a time. Left out: as many as take 32 MiB in float32."""
    tiled_mlp: bool = False
    """Compute MLPs a few tokens at a time, and again in the backward pass instead of storing their intermediate
    activations.
    """
    mlp_tile: Annotated[int, Field(ge=1)] | None = None
    """Number of tokens for which an MLP is computed at a time. Left out: the hidden size (Bekman et al., "Arctic Long
    Sequence Training", 2025).
    """
    recompute: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of the layers that store only their input and are computed again in the backward pass (Chen et al.,
    2016); 1 is ``gradient_checkpointing: true``."""
    offload_activations: bool = False
    """Keep what the backward pass needs in host memory instead of GPU memory, with TRL's streams; with ``recompute``,
    the inputs of layers.
    """
    sequence_parallel: Annotated[int, Field(ge=1), THIS_MACHINE] = 1
    """Number of processes that share every text: each holds some of its tokens, and in attention all tokens for some of
    the heads. Must divide the number of processes.
    """
