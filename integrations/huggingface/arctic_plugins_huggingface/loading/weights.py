"""The weights of a model that can be encoded, and the frozen modules that replace transformers' own.

These weights are those of linear modules and of the experts of mixtures. transformers holds experts as fused
three-dimensional parameters (``gate_up_proj [E, 2I, K]``, ``down_proj [E, K, I]``) and writes them to checkpoints as
one matrix per expert.

Read in transformers 5.19.0 (``integrations/moe.py``, ``core_model_loading.py``, ``conversion_mapping.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
)

from arctic_plugins.claims import LinearSpec
from arctic_plugins.frozen import (
    Codec,
    ExpertsDispatch,
    FrozenExperts,
    FrozenLinear,
    FrozenModule,
    FrozenWeight,
    Placement,
)
from arctic_plugins.patches import patch
from arctic_plugins_huggingface.loading.names import _reversed, _stored
from arctic_plugins_huggingface.loading.tasks import pretrained_part

__all__ = [
    "dispatch_experts",
    "freeze_modules",
    "frozen_weights",
    "plain_experts",
    "split_weight",
    "thaw_modules",
    "weight_specs",
]

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""Attributes that ``use_experts_implementation`` sets on the experts of a model."""


class FrozenHostExperts(FrozenExperts):
    """Frozen experts that replace transformers' module ``host``, call its activation and can restore it."""

    def __init__(self, host: Any, dtype: torch.dtype) -> None:
        super().__init__(
            host.num_experts,
            host._apply_gate if host.has_gate else host.act_fn,
            up=_up(host),
            dtype=dtype,
            dispatch=getattr(host, "dispatch", None),
        )
        self.__dict__["host"] = host  # not a submodule: it has no parameters left

    def to_host(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return transformers' module, with decoded weights."""
        host: nn.Module = self.__dict__["host"]
        for leaf in self.frozen:
            host.register_parameter(
                leaf, nn.Parameter(self.decode(dtype or self.compute_dtype, leaf), requires_grad=False)
            )
        return host.train(self.training)


def weight_specs(model: nn.Module) -> dict[str, LinearSpec]:
    """Map the dotted name of every weight that a plugin may claim to its shape.

    A linear module goes by its own name, the weights of experts by the name of the parameter. The model may be on the
    meta device or loaded. Heads, which are trained, and encoders of images are left out; see
    :func:`~arctic_plugins_huggingface.loading.tasks.pretrained_part`.
    """
    claimable = pretrained_part(model)
    tied = {name.removesuffix(".weight") for name in (getattr(model, "all_tied_weights_keys", None) or {})}
    specs: dict[str, LinearSpec] = {}
    conversions = _reversed(model) if any(_is_experts(module) for module in model.modules()) else ([], [])
    for name, module in model.named_modules():
        if not claimable(name):
            continue
        if type(module) in (nn.Linear, FrozenLinear):
            specs[name] = LinearSpec(module.out_features, module.in_features, module.bias is not None, name in tied)
        elif isinstance(module, FrozenExperts):
            specs |= {f"{name}.{leaf}": _experts_spec(weight.shape) for leaf, weight in module.frozen.items()}
        elif _is_experts(module) and _trouble(name, module, conversions) is None:
            specs |= {
                f"{name}.{leaf}": _experts_spec(tuple(getattr(module, leaf).shape))
                for leaf in (_up(module), "down_proj")
            }
    return specs


def _experts_spec(shape: tuple[int, ...]) -> LinearSpec:
    experts, out_features, in_features = shape
    return LinearSpec(out_features, in_features, experts=experts)


def plain_experts(model: nn.Module) -> dict[str, str]:
    """Map the dotted name of experts that cannot be encoded to the reason."""
    conversions = _reversed(model) if any(_is_experts(module) for module in model.modules()) else ([], [])
    found = {name: _trouble(name, module, conversions) for name, module in model.named_modules() if _is_experts(module)}
    return {name: why for name, why in found.items() if why is not None}


def _is_experts(module: Any) -> bool:
    return not isinstance(module, FrozenModule) and all(hasattr(module, flag) for flag in _FLAGS)


def _up(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _trouble(name: str, experts: Any, conversions: tuple[list[WeightRenaming], list[WeightConverter]]) -> str | None:
    """Return why experts cannot be encoded; None if they can."""
    if experts.is_transposed or experts.has_bias or not experts.is_concatenated:
        return "their weights are transposed or interleaved, or have biases"
    if getattr(experts, "_is_expert_parallel", False):
        return "transformers has distributed them"
    if not all(isinstance(getattr(experts, leaf, None), Tensor) for leaf in (_up(experts), "down_proj")):
        return "their weights have unknown names"
    if any(_stored(f"{name}.{leaf}", *conversions) is None for leaf in (_up(experts), "down_proj")):
        return "checkpoints store them fused"
    return None


def split_weight(name: str, spec: LinearSpec) -> tuple[str, str]:
    """Split a name of :func:`weight_specs` into the module's name and the name of the weight in it."""
    if spec.experts is None:
        return name, "weight"
    module, _, leaf = name.rpartition(".")
    return module, leaf


def dispatch_experts(model: PreTrainedModel, dispatches: Mapping[str, ExpertsDispatch]) -> None:
    """Reduce the experts of a ``model`` on the meta device to those of this process.

    Args:
        model: the model to change.
        dispatches: name of :func:`weight_specs` -> its dispatch.
    """
    if any(dispatch.size > 1 for dispatch in dispatches.values()):
        patch(
            model,
            "generate",
            why="processes that share experts must continue until all have finished; no generation config sets this",
            read_in="transformers 5.19.0",
        )(_generate_together)
    for name, dispatch in dispatches.items():
        path, leaf = name.rpartition(".")[::2]
        host: Any = model.get_submodule(path)
        plain, part = getattr(host, leaf), dispatch.local(host.num_experts)
        host.register_parameter(leaf, nn.Parameter(plain[part].clone(), requires_grad=plain.requires_grad))
        host.dispatch = dispatch
        model.set_experts_implementation(dispatch.experts_implementation)


def _generate_together(stock: Any, *args: Any, **kwargs: Any) -> Any:
    return stock(*args, **{"synced_gpus": True, **kwargs})


def freeze_modules(
    model: nn.Module,
    codecs: Mapping[str, Codec],
    placements: Mapping[str, Placement],
    *,
    device: torch.device | str | None = None,
    until_encoded: bool = False,
) -> None:
    """Replace the modules of these weights with frozen ones.

    Args:
        model: the model to change.
        codecs: name of :func:`weight_specs` -> codec.
        placements: name -> where its bytes go.
        device: device on which to allocate empty buffers; by default, that of the plain weight.
        until_encoded: whether to keep the plain weights until :meth:`FrozenModule.encode`, instead of allocating.
    """
    specs = weight_specs(model)
    for name, codec in codecs.items():
        path, leaf = split_weight(name, specs[name])
        module: Any = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            options: dict[str, Any] = {
                "device": device,
                "name": path,
                "placement": placements.get(name),
                "until_encoded": until_encoded,
            }
            model.set_submodule(path, FrozenLinear.from_linear(module, codec, **options))
            continue
        host, plain = (module.__dict__["host"] if isinstance(module, FrozenHostExperts) else module), None
        if host is module:
            module = FrozenHostExperts(host, getattr(host, leaf).dtype).train(host.training)
            model.set_submodule(path, module)
        plain = host._parameters.pop(leaf)
        weight = FrozenWeight(tuple(plain.shape), codec, name, placements.get(name))
        module.add_weight(leaf, weight, device=device or plain.device, until_encoded=plain if until_encoded else None)


def thaw_modules(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace frozen modules with transformers' own modules and decoded weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FrozenLinear):
            model.set_submodule(name, module.to_linear(dtype))
        elif isinstance(module, FrozenHostExperts):
            model.set_submodule(name, module.to_host(dtype))


def frozen_weights(model: nn.Module) -> dict[str, tuple[FrozenModule, str]]:
    """Map parameter names (``...q_proj.weight``, ``...experts.down_proj``) to the frozen module and the name in it."""
    return {
        f"{name}.{leaf}": (module, leaf)
        for name, module in model.named_modules()
        if isinstance(module, FrozenModule)
        for leaf in module.frozen
    }
