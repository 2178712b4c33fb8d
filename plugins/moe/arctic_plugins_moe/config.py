"""Options of the ``moe`` plugin."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from arctic_plugins import THIS_MACHINE, PluginConfig

__all__ = ["MoEConfig"]


class MoEConfig(PluginConfig):
    """Options under ``moe:`` in a recipe."""

    expert_parallel: Annotated[int, Field(ge=1), THIS_MACHINE] = 1
    """Number of processes, neighbors by rank, that together hold one copy of the experts. They have different batches.
    Processes at the same position in different groups hold the same experts and average their gradients."""
    overlap_degree: Annotated[int, Field(ge=1)] = 4
    """Number of pieces into which a process's experts are divided: the tokens of one piece travel while another is
    computed (Hwang et al., "Tutel", 2022, section 3.2, which divides tokens). More pieces hide more communication but
    make the products smaller."""
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    """In training, an expert takes at most ``capacity_factor * top_k * tokens / experts`` of a process's tokens in a
    micro-batch; the rest are dropped. Arctic was trained with 1. Left out: nothing is dropped."""
    min_capacity: Annotated[int, Field(ge=0)] = 0
    """With ``capacity_factor``: the lower bound of that number."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] | None = None
    """Weight with which the model's load balancing loss is added to the loss. Left out: as in the model's config."""
    router_z_loss_coef: Annotated[float, Field(ge=0)] | None = None
    """Arctic only: weight of the z-loss. Left out: as in the model's config."""
    log: bool = True
    """Log the load, entropy, dropped tokens and auxiliary loss of every layer with the Trainer's other metrics."""
