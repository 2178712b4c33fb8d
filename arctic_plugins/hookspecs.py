"""The contract: all hooks, in lifecycle order (process, resolve, build, train, serve, any time).

Hooks are called only through :class:`arctic_plugins.stack.Stack`, in the resolver's order. Two hooks run without a
stack: :func:`arctic_plugins.discovery.process_registry` calls :func:`register`, and :mod:`arctic_plugins.diagnosis`
calls :func:`diagnose`. No hook is ``firstresult``: results are collected. Where only one can win, the slot decides, or
an error names both plugins.
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
    """Declare what this plugin adds, as lazy ``"module:attribute"`` strings. Called once in every process.

    Implement it as a ``classmethod`` marked with ``hookimpl``: it runs for every *installed* plugin, without options,
    because vLLM's worker processes and ``from_pretrained`` have a checkpoint but no recipe. It must not import torch or
    a host.

    .. versionadded:: 0.1
    """


@hookspec
def validate(stack: Collection[Plugin], model_config: Any, hardware: str) -> Iterable[str] | None:
    """Check the stack. Called after it is resolved and before weights are read.

    Raise a :class:`~arctic_plugins.errors.UserError` for what cannot work on ``hardware`` (``"cpu"`` or ``"cuda"``)
    with this host config, or return warnings, one line each, which are logged.

    ``stack`` is the whole :class:`~arctic_plugins.stack.Stack`: iterating over it gives its plugins in order, and
    ``"lora" in stack`` looks for one by name.

    .. versionadded:: 0.1
    """


@hookspec
def claim(model_config: Any, modules: Mapping[str, LinearSpec]) -> Iterable[Claim] | None:
    """Claim modules. Called before weights are read, with the model on the meta device.

    A claim names modules, a slot, and the object that fills it. ``modules`` maps the dotted name of every linear module
    to its shape. All claims are collected and checked together: if two of them conflict, nothing has been modified yet.

    .. versionadded:: 0.1
    """


@hookspec
def hf_configure_model(config: Any) -> None:
    """Change the ``PreTrainedConfig`` in place. Called before transformers instantiates the model class.

    .. versionadded:: 0.1
    """


@hookspec
def hf_transform_model(model: Any) -> Any | None:
    """Change ``model`` in place or return a replacement. Called in order, after transformers has loaded the weights.

    .. versionadded:: 0.1
    """


@hookspec
def hf_training_arguments(args: Any) -> None:
    """Change the ``TrainingArguments`` in place, except what the user set. Called before a Trainer is built.

    .. versionadded:: 0.1
    """


@hookspec
def hf_attach_trainer(trainer: Any) -> None:
    """Add callbacks to a Trainer, and what no callback can reach. Called by ``attach(trainer, stack)``.

    .. versionadded:: 0.1
    """


@hookspec
def vllm_engine_args(checkpoint: Path) -> Mapping[str, Any] | None:
    """Return vLLM engine arguments (``EngineArgs`` field names) for ``checkpoint``. Called only by ``arctic serve``.

    If two plugins return different values for the same key, an error names both. What the user sets on the command line
    takes precedence. A plugin that only does this, and fills no slot, works with every checkpoint: with ``arctic serve
    CHECKPOINT --plugins NAME``, or recorded in the checkpoint.

    .. versionadded:: 0.1
    """


@hookspec
def vllm_check(arguments: Mapping[str, Any], model_config: Mapping[str, Any]) -> None:
    """Raise a :class:`~arctic_plugins.errors.UserError` for what vLLM cannot do. Called by ``arctic serve`` before vLLM
    starts.

    ``arguments`` has the engine arguments of all plugins and of the checkpoint, and, in their place, what the user set
    on the command line: text, or True for an option without a value. ``model_config`` is the ``config.json`` of the
    model, for an adapter that of its base model; it is empty for a model that is not on this machine yet.

    .. versionadded:: 0.1
    """


@hookspec
def diagnose() -> Iterable[Finding] | None:
    """Return what this plugin finds on this machine, for example kernels and compilers. Called by ``arctic doctor``.

    Implement it as a ``classmethod``, like ``register``: it runs for every installed plugin, without options, in a
    process of its own, and may import torch.

    .. versionadded:: 0.1
    """
