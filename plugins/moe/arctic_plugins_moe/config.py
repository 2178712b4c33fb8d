"""Options of the ``moe`` plugin."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from arctic_plugins import THIS_MACHINE, PluginConfig

__all__ = ["MoEConfig"]


class MoEConfig(PluginConfig):
    """What stands under ``moe:`` in a recipe."""

    expert_parallel: Annotated[int, Field(ge=1), THIS_MACHINE] = 1
    """Processes that hold the experts of one copy of the model together, neighbours by rank. They have different
    batches; processes at the same place in different groups hold the same experts, whose gradients they average."""
    overlap_degree: Annotated[int, Field(ge=1)] = 4
    """Into so many pieces a process's experts are divided: the tokens of one travel while another is computed (Hwang et
    al., "Tutel", 2022, section 3.2, where tokens are divided). More hide more communication behind smaller products."""
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    """While training, no expert takes more than ``capacity_factor * top_k * tokens / experts`` of one process's tokens
    in a micro-batch; the rest is dropped. Arctic was trained with 1. Left out: nothing is dropped."""
    min_capacity: Annotated[int, Field(ge=0)] = 0
    """With ``capacity_factor``: an expert takes at least so many."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] | None = None
    """Adds the model's load balancing loss with this weight to the loss. Left out: as the model's config says."""
    router_z_loss_coef: Annotated[float, Field(ge=0)] | None = None
    """Arctic only: the weight of the z-loss. Left out: as the model's config says."""
    log: bool = True
    """Log expert load, entropy, dropped tokens and auxiliary loss of every layer with the Trainer's other figures."""
