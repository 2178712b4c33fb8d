"""Libraries that make a Trainer's steps in the place of torch's optimizer, and what their plugins tell the host."""

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
    """Subclass for each library, and register the class with ``registry.trainer_engine`` under the name that the
    library has in ``TrainingArguments``.

    The module that defines it must not import the library: it is also asked about checkpoints of runs that did not use
    it.
    """

    title: ClassVar[str]
    """How the library spells itself, for messages."""
    state_file: ClassVar[str]
    """Name of a file that each of its checkpoints has and that no other has."""

    @abstractmethod
    def mixins(self, trainer: Trainer) -> list[type[Trainer]]:
        """What the class of ``trainer`` is composed of so that this library can make its steps, the innermost first;
        see :mod:`arctic_plugins_huggingface.training.mixins`.
        """

    @abstractmethod
    def processes(self, checkpoint: Path) -> int | None:
        """How many processes have to resume from ``checkpoint``; None if any number can."""


def engines() -> dict[str, TrainerEngine]:
    """Those of all installed plugins, by name."""
    registry = process_registry()
    return {name: registry.load_trainer_engine(name)() for name in registry.trainer_engines()}


def engine_mixins(trainer: Trainer, name: str) -> list[type[Trainer]]:
    """What the class of ``trainer`` is composed of, whose steps the library ``name`` makes.

    A plain model needs nothing, and no plugin.

    Raises:
        PluginNotFoundError: the model has frozen or spread modules, and no installed plugin prepares them.
    """
    model = trainer.model
    assert model is not None  # Trainer.__init__ sees to it
    if name not in (known := engines()):
        if is_spread(model) or any(isinstance(module, FrozenModule) for module in model.modules()):
            check_engine(name)
        return []
    return known[name].mixins(trainer)
