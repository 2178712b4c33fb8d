"""Stacks that checkpoints record in ``arctic_plugins.json``."""

from __future__ import annotations

import json
from pathlib import Path

from arctic_plugins.errors import CheckpointError
from arctic_plugins.provenance import check_plugins, read_provenance
from arctic_plugins.stack import Stack

__all__ = ["recorded_stack", "stack_from_checkpoint"]

LONGEST_STACK = 100_000
"""Maximum number of characters of a checkpoint's stack: every pattern in it is matched against every module."""


def stack_from_checkpoint(path: str | Path) -> Stack:
    """Return the stack that wrote the checkpoint directory ``path``, without anything that concerns the machine.

    The source of a checkpoint may be untrusted. Placements are left out, and options marked with
    :data:`~arctic_plugins.plugin.THIS_MACHINE` have their defaults: whoever runs the model decides where bytes go.

    Raises:
        CheckpointError: ``path`` is not a complete checkpoint, or its stack is too long.
        PluginNotFoundError: a plugin that made it is not installed.
    """
    recorded = recorded_stack(path)
    if (size := len(json.dumps(recorded.to_dict()))) > LONGEST_STACK:
        raise CheckpointError(
            f"the stack of {path} has {size} characters",
            expected=f"at most {LONGEST_STACK}",
            fix="create the checkpoint again",
        )
    return recorded.anywhere()


def recorded_stack(path: str | Path) -> Stack:
    """Return the whole stack that wrote the checkpoint directory ``path``, to compare with or to show, not to apply.

    Raises:
        CheckpointError: ``path`` is not a complete checkpoint.
        PluginNotFoundError: a plugin that made it is not installed.
    """
    provenance = read_provenance(path)
    check_plugins(provenance)
    return Stack.from_dict(provenance.stack)
