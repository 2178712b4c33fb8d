"""Compose a subclass of a Trainer's class, whichever it is, from small mixin classes.

A mixin overrides methods of ``transformers.Trainer`` and calls ``super()``. It has no ``__init__``, because the trainer
already exists. Instead, it initializes itself in its method ``on_attach(plugin)``, which is called once, after the
class is composed, with the plugin that contributed the mixin, or with None if the host did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from arctic_plugins.errors import ConfigError
from arctic_plugins.plugin import Plugin
from arctic_plugins.registry import load
from arctic_plugins.stack import Stack

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["compose", "mixins_of", "plugin_mixins"]

Part = tuple[type, Plugin | None]
"""A mixin, and the plugin that contributed it."""


def plugin_mixins(stack: Stack) -> list[Part]:
    """Return the mixins that the plugins of ``stack`` add to a Trainer, in the order of the stack."""
    return [(load(target), plugin) for target, plugin in stack.trainer_mixins()]


def compose(trainer: Trainer, parts: Sequence[Part]) -> None:
    """Give ``trainer`` its own class: ``parts`` in front of its present class, the first part next to that class.

    A part that comes later in the stack therefore wraps those before it. The trainer remains an instance of its
    present class.

    Raises:
        ConfigError: if the trainer is already attached to a stack.
    """
    kind = type(trainer)
    if mixins_of(trainer):
        raise ConfigError("the trainer is already attached to a stack", fix="call attach only once for each trainer")
    names = ", ".join(f"{mixin.__name__} ({plugin.name if plugin else 'host'})" for mixin, plugin in parts)
    bases = (*(mixin for mixin, _ in reversed(parts)), kind)
    members: dict[str, Any] = {
        "__doc__": f"{kind.__name__} with {names}.",
        "__module__": __name__,
        "__repr__": lambda self: f"<{type(self).__name__}: {names}>",
        "arctic_mixins": tuple(parts),
    }
    trainer.__class__ = type(f"Arctic{kind.__name__}", bases, members)
    for mixin, plugin in parts:
        if (begin := getattr(mixin, "on_attach", None)) is not None:
            begin(trainer, plugin)


def mixins_of(trainer: Trainer) -> tuple[Part, ...]:
    """Return the mixins that ``trainer`` is composed of; empty if it was not attached to a stack."""
    parts: tuple[Part, ...] = getattr(type(trainer), "arctic_mixins", ())
    return parts
