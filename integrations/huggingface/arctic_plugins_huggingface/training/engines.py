"""Libraries that run a Trainer's steps in place of torch's optimizer, and what their plugins provide to the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from transformers import Trainer

from arctic_plugins.discovery import process_registry
from arctic_plugins.frozen import FrozenModule
from arctic_plugins_huggingface.checkpoints.gather import is_spread
from arctic_plugins_huggingface.training.check import check_engine

__all__ = ["TrainerEngine", "engine_mixins", "engines"]


class TrainerEngine(ABC):
    """A library that runs a Trainer's steps.

    Write a subclass for each library, and register the class with ``registry.trainer_engine`` under the library's name
    in ``TrainingArguments``. The module that defines it must not import the library: it is also used for checkpoints of
    runs without the library.
    """

    title: ClassVar[str]
    """The library's own spelling of its name, for messages.

    .. versionadded:: 0.1
    """
    state_file: ClassVar[str]
    """Name of a file that every checkpoint of this library has and no other checkpoint has.

    .. versionadded:: 0.1
    """

    @abstractmethod
    def mixins(self, trainer: Trainer) -> list[type[Trainer]]:
        """Return the mixins that ``trainer`` needs for this library to run its steps, the innermost first.

        See :mod:`arctic_plugins_huggingface.training.mixins`.

        .. versionadded:: 0.1
        """

    @abstractmethod
    def processes(self, checkpoint: Path) -> int | None:
        """Return the number of processes that must resume from ``checkpoint``; None if any number can.

        .. versionadded:: 0.1
        """


def engines() -> dict[str, TrainerEngine]:
    """Return the engines of all installed plugins, by name."""
    registry = process_registry()
    return {name: registry.load_trainer_engine(name)() for name in registry.trainer_engines()}


def engine_mixins(trainer: Trainer, name: str) -> list[type[Trainer]]:
    """Return the mixins that ``trainer`` needs for the library ``name`` to run its steps.

    A plain model needs no mixins and no plugin.

    Raises:
        PluginNotFoundError: if the model has frozen or spread modules and no installed plugin prepares them.
    """
    model = trainer.model
    assert model is not None  # ensured by Trainer.__init__
    if name not in (known := engines()):
        if is_spread(model) or any(isinstance(module, FrozenModule) for module in model.modules()):
            check_engine(name)
        return []
    return known[name].mixins(trainer)
