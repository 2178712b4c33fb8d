"""Auxiliary losses of routers, expert capacity, and router statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from arctic_plugins.frozen import ExpertsDispatch

__all__ = ["Capacity", "expert_load", "load_balancing_loss", "router_entropy", "z_loss"]


def load_balancing_loss(
    router_logits: Sequence[Tensor],
    top_k: int,
    attention_mask: Tensor | None = None,
    dispatch: ExpertsDispatch | None = None,
) -> Tensor:
    """Return the load balancing loss, ``sum over layers of E * sum over e of f_e * P_e``.

    f_e is the fraction of tokens that have expert e among their ``top_k``, and P_e the mean probability of e (Fedus et
    al., "Switch Transformers", 2021, equations 4 to 6). The loss is summed over layers, as in Arctic's training;
    Mixtral averages instead. With a dispatch over several processes, f_e is computed over the tokens of all processes
    (Qiu et al., "Demons in the Detail", 2025), so that the mean of the processes' results, weighted by their tokens, is
    the loss of all tokens together. This is a collective operation.

    Args:
        router_logits: ``[tokens, E]`` for each layer.
        top_k: number of experts per token.
        attention_mask: ``[batch, length]``; padding does not count.
        dispatch: the dispatch of the experts.
    """
    device, experts = router_logits[0].device, router_logits[0].shape[-1]
    chosen, probability = [], []
    for logits in router_logits:
        probabilities = logits.softmax(-1, dtype=torch.float32)
        counted = _counted(logits, attention_mask)
        one_hot = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
        chosen.append(torch.cat([(one_hot * counted).sum(0), counted.sum(0)]).to(device))
        probability.append(((probabilities * counted).sum(0) / counted.sum()).to(device))
    counts = torch.stack(chosen).detach()
    if dispatch is not None and dispatch.size > 1:
        dispatch.sum_over_parts(counts)
        dispatch.sum_over_copies(counts)
    return experts * (counts[:, :experts] / counts[:, experts:] * torch.stack(probability)).sum()


def z_loss(router_logits: Sequence[Tensor], attention_mask: Tensor | None = None) -> Tensor:
    """Return ``sum over layers of mean over tokens of logsumexp(logits) ** 2``.

    The z-loss of Zoph et al., "ST-MoE", 2022, equation 5. The arguments are those of :func:`load_balancing_loss`.
    """
    losses = []
    for logits in router_logits:
        counted = _counted(logits, attention_mask).squeeze(-1)
        losses.append((logits.float().logsumexp(-1) ** 2 * counted).sum() / counted.sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _counted(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return ``[tokens, 1]``: 1 for tokens, 0 for padding."""
    if attention_mask is None or attention_mask.ndim != 2 or attention_mask.numel() != len(logits):
        return logits.new_ones(len(logits), 1, dtype=torch.float32)
    return attention_mask.reshape(-1, 1).to(logits.device, torch.float32)


def expert_load(index: Tensor, num_experts: int) -> Tensor:
    """Return each expert's share of all decisions in ``index``, ``[E]``; 1 / E if balanced.

    Indices out of range are not counted.
    """
    chosen = index.where((index >= 0) & (index < num_experts), num_experts).reshape(-1)
    # not bincount, which waits for the device
    counts = chosen.new_zeros(num_experts + 1).scatter_add_(0, chosen, torch.ones_like(chosen))[:num_experts].float()
    return counts / counts.sum().clamp_min(1)


def router_entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of the routing probabilities of ``logits [tokens, E]``, in nats.

    It is ``log(E)`` if the router has no preference.
    """
    log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
    return -(log_probabilities.exp() * log_probabilities).sum(-1).mean()


class Capacity:
    """A limit on the number of one process's tokens that an expert takes.

    ``capacity = max(min_capacity, ceil(factor * top_k * tokens / experts))``. Decisions beyond it are dropped; the
    residual stream still carries the token. First choices come before second ones, and earlier tokens before later
    ones. The weights of a token's remaining experts are scaled to the sum of all its weights. This is DeepSpeed's
    ``top1gating`` and ``top2gating`` (deepspeed 0.19, ``moe/sharded_moe.py``), without their noise.
    """

    def __init__(self, factor: float, min_capacity: int = 0) -> None:
        self.factor, self.min_capacity = factor, min_capacity

    def rows(self, tokens: int, top_k: int, num_experts: int) -> int:
        """Return the number of rows that one expert takes of ``tokens``."""
        return max(self.min_capacity, math.ceil(self.factor * top_k * tokens / num_experts))

    def apply(self, index_MT: Tensor, weights_MT: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Drop decisions beyond the capacity.

        Returns:
            ``index`` with ``num_experts`` (an expert that does not exist) in place of dropped decisions, and the
            weights of the others.
        """
        tokens, top_k = index_MT.shape
        choices = index_MT.t().reshape(-1)  # all first choices, then all second ones
        one_hot = torch.nn.functional.one_hot(choices.clamp(0, num_experts), num_experts + 1)
        position = (one_hot.cumsum(0) - 1).gather(1, choices[:, None].clamp(0, num_experts)).squeeze(1)
        kept = (position < self.rows(tokens, top_k, num_experts)).view(top_k, tokens).t()
        weights = weights_MT * kept
        if top_k > 1:
            weights = weights * (
                weights_MT.sum(-1, keepdim=True)
                / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
            )
        return index_MT.where(kept, num_experts), weights
