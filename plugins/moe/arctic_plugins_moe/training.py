"""Router statistics in the Trainer's logs. Read in transformers 5.19.0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from arctic_plugins_moe.router import Capacity, expert_load, load_balancing_loss, router_entropy

if TYPE_CHECKING:
    from arctic_plugins_moe.plugin import MoE

__all__ = ["LogsRouters", "RouterFigures"]


class LogsRouters(Trainer):
    """Mixin that adds the statistics of every router of the model to the Trainer's logs."""

    model: nn.Module
    router_figures: RouterFigures

    def on_attach(self, plugin: MoE) -> None:
        options = plugin.options
        capacity = None if options.capacity_factor is None else Capacity(options.capacity_factor, options.min_capacity)
        self.router_figures = RouterFigures(self.model, capacity)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, **self.router_figures.take()} if "loss" in logs else logs, *args, **kwargs)


class RouterFigures:
    """Statistics of each layer with a router, in this process, over the training steps between two logs.

    - ``load_max`` and ``load_min``: tokens of the most and the least used expert, as multiples of an even share.
    - ``entropy``: entropy of the routing probabilities, in nats.
    - ``dropped``: fraction of decisions beyond the capacity.
    - ``aux_loss``: load balancing loss of this layer (top_k if balanced).

    Args:
        model: its routers are the modules that it records as ``router_logits``; they return (logits, weights, indices).
        capacity: None if nothing is dropped.
    """

    def __init__(self, model: nn.Module, capacity: Capacity | None = None) -> None:
        self.capacity = capacity
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._calls: dict[str, int] = {}
        for name, module in routers(model).items():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        @torch.no_grad()
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not module.training or not isinstance(output, tuple) or len(output) != 3:
                return
            logits, weights, index = output
            experts = logits.shape[-1]
            load = expert_load(index, experts) * experts
            figures = {
                "load_max": load.max(),
                "load_min": load.min(),
                "entropy": router_entropy(logits),
                "aux_loss": load_balancing_loss([logits], index.shape[-1]),
            }
            if self.capacity is not None:
                kept, _ = self.capacity.apply(index, weights, experts)
                figures["dropped"] = (kept == experts).float().mean()
            sums = self._sums.setdefault(name, {})
            for key, value in figures.items():
                sums[key] = sums.get(key, 0) + value
            self._calls[name] = self._calls.get(name, 0) + 1

        return hook

    def take(self) -> dict[str, float]:
        """Return the means since the last call, under names such as ``moe/layer_3/entropy``, and reset them."""
        means = {
            f"moe/{name}/{key}": value / self._calls[name]
            for name, sums in self._sums.items()
            for key, value in sorted(sums.items())
        }
        self._sums, self._calls = {}, {}
        if not means:
            return {}
        device = next(iter(means.values())).device
        together = torch.stack([value.to(device, torch.float32) for value in means.values()])
        return dict(zip(means, together.tolist(), strict=True))  # read from the device once


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Return a mapping of ``layer_3`` (or the dotted name, if it has no unique number) to the router."""
    kinds: set[type] = set()
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        kind = getattr(recorded, "target_class", recorded)
        if isinstance(kind, type):
            kinds.add(kind)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module) in kinds:
            layer = next((part for part in name.split(".") if part.isdigit()), None)
            label = f"layer_{layer}"
            found[name if layer is None or label in found else label] = module
    return found
