"""The stacks that checkpoints record in ``arctic_plugins.json``."""

from __future__ import annotations

import json
from pathlib import Path

from arctic_plugins.errors import CheckpointError
from arctic_plugins.provenance import check_plugins, read_provenance
from arctic_plugins.stack import Stack

__all__ = ["recorded_stack", "stack_from_checkpoint"]

LONGEST_STACK = 100_000
"""Characters of a stack that comes out of a checkpoint: every pattern in it is matched with every module."""


def stack_from_checkpoint(path: str | Path) -> Stack:
    """What the checkpoint directory ``path`` says of how it is computed: the stack that wrote it, less what is about
    the machine.

    A checkpoint may come from a stranger. Placements are left out, and options marked with
    :data:`~arctic_plugins.plugin.THIS_MACHINE` have their defaults: where bytes go is for who runs it to say.

    Raises:
        CheckpointError: ``path`` is no complete checkpoint, or its stack is too long.
        PluginNotFoundError: a plugin that made it is not installed.
    """
    recorded = recorded_stack(path)
    if (size := len(json.dumps(recorded.to_dict()))) > LONGEST_STACK:
        raise CheckpointError(
            f"the stack of {path} takes {size} characters", expected=f"at most {LONGEST_STACK}", fix="make it again"
        )
    return recorded.anywhere()


def recorded_stack(path: str | Path) -> Stack:
    """The whole stack that wrote the checkpoint directory ``path``: to compare with or to show, not to apply.

    Raises:
        CheckpointError: ``path`` is no complete checkpoint.
        PluginNotFoundError: a plugin that made it is not installed.
    """
    provenance = read_provenance(path)
    check_plugins(provenance)
    return Stack.from_dict(provenance.stack)
