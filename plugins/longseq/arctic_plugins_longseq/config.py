"""Options of the ``longseq`` plugin."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from arctic_plugins import THIS_MACHINE, PluginConfig

__all__ = ["LongSeqConfig"]


class LongSeqConfig(PluginConfig):
    """What stands under ``longseq:`` in a recipe."""

    tiled_loss: bool = True
    """Compute the loss from the hidden states, a few tokens at a time, forward and backward; logits of all tokens never
    exist.
    """
    loss_tile: Annotated[int, Field(ge=1)] | None = None
    """Tokens whose logits exist at a time. Left out: as many as make 32 MiB in float32."""
    tiled_mlp: bool = False
    """Compute MLPs a few tokens at a time, and again in the backward pass instead of keeping what is between their
    matrices.
    """
    mlp_tile: Annotated[int, Field(ge=1)] | None = None
    """Tokens for which an MLP is computed at a time. Left out: as many as the hidden size (Bekman et al., "Arctic Long
    Sequence Training", 2025).
    """
    recompute: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the layers that are computed again in the backward pass and keep only their input until then (Chen et
    al., 2016); 1 is ``gradient_checkpointing: true``."""
    offload_activations: bool = False
    """Keep what the backward pass needs in host memory instead of the GPU's, with TRL's streams; with ``recompute``,
    the inputs of layers.
    """
    sequence_parallel: Annotated[int, Field(ge=1), THIS_MACHINE] = 1
    """Processes that share every text: each has some of its tokens, and some heads of all tokens in attention. A
    divisor of the processes.
    """
