"""The contract, in lifecycle order: process, resolve, build, train, serve, any time.

Hooks are called only through :class:`arctic_plugins.stack.Stack`, in the resolver's order, and, for the two that run
without a stack, :func:`register` through :func:`arctic_plugins.discovery.process_registry` and :func:`diagnose` through
:mod:`arctic_plugins.diagnosis`. None is ``firstresult``: results are collected, and where only one can win the slot
decides or both plugins are named in an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from arctic_plugins.plugin import PROJECT, Finding, Plugin

if TYPE_CHECKING:
    from pathlib import Path

    from arctic_plugins.claims import Claim, LinearSpec
    from arctic_plugins.registry import Registry

hookspec = pluggy.HookspecMarker(PROJECT)


@hookspec
def register(registry: Registry) -> None:
    """Every process, once: name what this plugin adds, as lazy ``"module:attribute"`` strings.

    Implement it as a ``classmethod`` marked with ``hookimpl``: it runs for every *installed* plugin, without options,
    because vLLM's worker processes and ``from_pretrained`` get a checkpoint and no recipe. Must not import torch or a
    host.
    """


@hookspec
def validate(stack: Collection[Plugin], model_config: Any, hardware: str) -> Iterable[str] | None:
    """After resolution and before weights are read: raise a :class:`~arctic_plugins.errors.UserError` for what cannot
    work on ``hardware`` (``"cpu"`` or ``"cuda"``) with this host config, or return warnings, one line each, which are
    logged.

    ``stack`` is the whole :class:`~arctic_plugins.stack.Stack`: it iterates over its plugins in order, and
    ``"lora" in stack`` asks for one by name.
    """


@hookspec
def claim(model_config: Any, modules: Mapping[str, LinearSpec]) -> Iterable[Claim] | None:
    """Before weights are read, with the model on the meta device: say which modules this plugin wants, in which slot,
    with which object.

    ``modules`` maps the dotted name of every linear module to its shape. All claims are collected and checked together;
    nothing has been touched when two of them clash.
    """


@hookspec
def hf_configure_model(config: Any) -> None:
    """transformers, before the model class is instantiated: change the ``PreTrainedConfig`` in place."""


@hookspec
def hf_transform_model(model: Any) -> Any | None:
    """transformers, after the weights are loaded, in order: change ``model`` in place or return its replacement."""


@hookspec
def hf_training_arguments(args: Any) -> None:
    """transformers, before a Trainer is built: change the ``TrainingArguments`` in place; leave what the user set."""


@hookspec
def hf_attach_trainer(trainer: Any) -> None:
    """transformers, from ``attach(trainer, stack)``: add callbacks, and what no callback can reach."""


@hookspec
def vllm_engine_args(checkpoint: Path) -> Mapping[str, Any] | None:
    """``arctic serve`` only: vLLM engine arguments (``EngineArgs`` field names) for ``checkpoint``.

    Two plugins that give one key different values are an error that names both; what the user says on the command line
    wins.
    """


@hookspec
def diagnose() -> Iterable[Finding] | None:
    """``arctic doctor``: what this plugin finds on this machine, kernels and compilers for instance.

    Implement it as a ``classmethod``, like ``register``: it runs for every installed plugin, without options, in a
    process of its own, and may import torch.
    """
