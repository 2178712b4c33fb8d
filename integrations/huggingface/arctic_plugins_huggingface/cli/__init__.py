"""Subcommands of ``arctic`` for the Hugging Face host. These modules import nothing heavy until a command runs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import click

__all__ = ["importing", "quiet_hosts", "trust_option"]


def trust_option(command: Any) -> Any:
    """Add ``--trust-remote-code`` to a command that reads a model."""
    text = (
        "Execute the code that the model's repository contains, if the model needs it. Read it first: it can do "
        "anything that you can do. Results do not record the choice."
    )
    return click.option("--trust-remote-code", is_flag=True, help=text)(command)


@contextmanager
def importing() -> Iterator[None]:
    """Speed up the imports of hosts in the block: turn off garbage collection, and postpone bitsandbytes.

    Garbage collection takes a fifth of the import time.
    """
    _postpone_bitsandbytes()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quiet_hosts() -> None:
    """Turn off the hosts' progress bars if standard error is not a terminal.

    Also set the environment variables that plugins register. They tell libraries what these would otherwise detect, and
    print, when they are imported.
    """
    from arctic_plugins.discovery import process_registry

    for name, value in process_registry().load_environment().items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


class _Postponed(ModuleType):
    """A module that is executed when one of its attributes is first used."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__path__ = self.__spec__.submodule_search_locations  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _postpone_bitsandbytes() -> None:
    """Postpone executing bitsandbytes until one of its attributes is used.

    If it is installed, PEFT imports it (peft/helpers.py, 0.21.2). It imports torch's compiler, which takes longer than
    all of PEFT. Python's ``LazyLoader`` would already execute it at the next ``import`` (3.11).
    """
    if "bitsandbytes" not in sys.modules and (spec := find_spec("bitsandbytes")) is not None:
        module = sys.modules["bitsandbytes"] = _Postponed("bitsandbytes")
        module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
