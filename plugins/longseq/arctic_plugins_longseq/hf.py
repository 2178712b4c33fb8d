"""Tiled loss, tiled MLPs and recomputed layers in transformers models.

Read in transformers 5.19.0 (``loss/loss_utils.py``, ``modeling_utils.py``, ``modeling_layers.py``).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer

from arctic_plugins import Plugin
from arctic_plugins.errors import ConfigError
from arctic_plugins.patches import patch
from arctic_plugins_longseq.loss import default_tile, tiled_cross_entropy

__all__ = [
    "OffloadedActivations",
    "TiledEvaluation",
    "causal_lm",
    "offload_activations",
    "recompute",
    "tile_loss",
    "tile_mlps",
]

MLPS = ("mlp", "feed_forward", "residual_mlp")


class _TiledHead:
    """The head of a causal language model that passes hidden states to the loss, which applies the head tile by tile.

    This happens only in training and when labels are given; otherwise the model returns its logits as usual.
    """

    def __init__(self, model: Any, tile: int | None) -> None:
        self.model, self.head, self.tile = model, model.get_output_embeddings(), tile
        self.in_evaluation = self.tiling = False
        self.signature = inspect.signature(model.forward)
        why = "the loss needs hidden states, but the model's own forward computes logits first"
        patch(model, "forward", why=why, read_in="transformers 5.19.0")(self.model_forward)
        patch(self.head, "forward", why=why, read_in="transformers 5.19.0")(self.hidden_or_logits)
        model.loss_function = self.loss
        model._arctic_tiled_head = self

    def model_forward(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        labels = self.signature.bind_partial(*args, **kwargs).arguments.get("labels")
        if labels is None or not (self.model.training or self.in_evaluation):
            return stock(*args, **kwargs)
        self.tiling = True
        try:
            outputs = stock(*args, **{**kwargs, "return_dict": True})
        finally:
            self.tiling = False
        outputs.logits = None  # they were hidden states
        return outputs

    def hidden_or_logits(self, stock: Any, hidden: Tensor, *args: Any) -> Any:
        return hidden if self.tiling else stock(hidden, *args)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute transformers' ``ForCausalLMLoss``."""
        if not self.tiling:
            items = cast("Tensor | None", num_items_in_batch)  # or an int, which the host's annotation omits
            return ForCausalLMLoss(logits, labels, vocab_size, items, ignore_index, shift_labels, **kwargs)
        self.tiling = False  # from here on the head computes logits again
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = shift_labels.to(logits.device)
        tile = self.tile or default_tile(vocab_size)
        total = tiled_cross_entropy(logits, shift_labels, self.head, list(self.head.parameters()), tile, ignore_index)
        if num_items_in_batch is None:
            return total / (shift_labels != ignore_index).sum()
        return total / (
            num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        )


def causal_lm(model: Any) -> Any:
    """Return ``model``, or the model inside an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def tile_loss(model: Any, tile: int | None) -> None:
    """Make ``model``, or the model inside an adapter, compute its loss without logits.

    Raises:
        ConfigError: the model has its own loss, or changes logits after its head; the tiled loss would ignore both.
    """
    model = causal_lm(model)
    fix = "set plugins.longseq.tiled_loss: false"
    if model.loss_function is not ForCausalLMLoss:
        raise ConfigError(
            f"plugins.longseq: {type(model).__name__} has its own loss function",
            expected="cross-entropy of the next token",
            fix=fix,
        )
    assigned = _assigned(type(model).forward, "logits")
    changes = [text for text in assigned if not text.startswith("logits = self.lm_head(")]
    if changes or not assigned:
        raise ConfigError(
            f"plugins.longseq: {type(model).__name__} changes logits after its head "
            f"({changes[0] if changes else 'it has no lm_head'})",
            expected="a loss over the unchanged logits of the head",
            fix=fix,
        )
    _TiledHead(model, tile)


def _assigned(function: Any, name: str) -> list[str]:
    """Return the statements of ``function`` that assign to ``name``."""
    found = []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, (ast.AugAssign, ast.AnnAssign))
            else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            found.append(ast.unparse(node))
    return found


def tile_mlps(model: nn.Module, tile: int | None) -> None:
    """Compute every MLP of ``model`` a few tokens at a time, each tile under its own activation checkpoint.

    Mixtures of experts are left unchanged.

    Raises:
        ConfigError: the model has no such MLP.
    """
    found = 0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in MLPS and not any("expert" in part for part, _ in module.named_modules()):
            patch(module, "forward", why="an MLP is computed a few tokens at a time", read_in="transformers 5.19.0")(
                functools.partial(_in_tiles, module, tile)
            )
            found += 1
    if not found:
        raise ConfigError(
            "plugins.longseq: this model has no MLP that can be tiled",
            expected=f"one of {', '.join(MLPS)}",
            fix="set tiled_mlp: false",
        )


def _in_tiles(module: nn.Module, tile: int | None, forward: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    tiles = flat.split(tile or x.shape[-1])
    if not (module.training and torch.is_grad_enabled()):
        return (torch.cat([forward(part) for part in tiles]) if len(tiles) > 1 else forward(flat)).view(x.shape)
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in tiles]).view(x.shape)


def recompute(model: Any, share: float) -> None:
    """Make a fraction ``share`` of the layers, evenly spread over the model, store only their input.

    Raises:
        ConfigError: no layer supports it.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            "plugins.longseq: this model's layers cannot be recomputed",
            expected="layers that support gradient checkpointing",
            fix="set recompute: 0",
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = int((number + 1) * share) > int(number * share)


class TiledEvaluation(Trainer):
    """Mixin that avoids logits in evaluation as well, unless the trainer needs them."""

    def on_attach(self, plugin: Plugin) -> None:
        head = causal_lm(self.model)._arctic_tiled_head
        head.in_evaluation = self.compute_metrics is None and self.preprocess_logits_for_metrics is None
        if head.in_evaluation:
            self.args.prediction_loss_only = True


class OffloadedActivations(Trainer):
    """Mixin that keeps what the backward pass needs in host memory; without an accelerator it is there anyway."""

    model: nn.Module
    offloading: Any

    def on_attach(self, plugin: Plugin) -> None:
        self.offloading = nullcontext()
        # TRL's own trainer does this if its arguments enable it.
        if torch.accelerator.is_available() and not getattr(self.args, "activation_offloading", False):
            self.offloading = offload_activations(self.model)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.offloading:
            return super().training_step(*args, **kwargs)


def offload_activations(model: nn.Module) -> AbstractContextManager[Any]:
    """Return TRL's context in which saved activations go to pinned host memory, without its waits for the device.

    Read in trl 1.16.0 (``models/activation_offloading.py``). It copies on a second stream, keeps the last five
    activations on the device, where the backward pass begins, and leaves the head alone. When the context ends, TRL
    waits for both streams, once per forward and backward pass. It is enough that the streams wait for each other: what
    is freed then goes to whichever stream allocated it. When it begins, TRL returns the allocator's cache to the device
    if bitsandbytes happens to be installed, for buffers of its 4-bit layers, which waits as well. **Never run on a
    GPU.**
    """
    from trl.models.activation_offloading import OffloadActivations, get_act_offloading_ctx_manager

    class Offloading(OffloadActivations):
        def __exit__(self, *args: Any) -> Any:
            compute, copies = self.s0, self.s1
            compute.wait_stream(copies)  # for activations that are still being copied
            copies.wait_stream(compute)  # for those that were brought back and are still in use
            for stash in (self.fwd_stash, self.bwd_tensor_stash, self.bwd_ev_stash):
                stash.clear()
            return saved_tensors_hooks.__exit__(self, *args)

    context = get_act_offloading_ctx_manager(model=model, warn_if_no_head=False)
    context.__class__ = Offloading
    device = context.device_module
    context.device_module = SimpleNamespace(
        stream=device.stream, current_stream=device.current_stream, empty_cache=lambda: None
    )
    return cast("AbstractContextManager[Any]", context)
