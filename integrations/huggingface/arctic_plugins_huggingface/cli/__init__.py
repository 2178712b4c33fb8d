"""Subcommands of ``arctic`` for the Hugging Face host. Modules here import nothing heavy until a command runs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["importing", "quiet_hosts"]


@contextmanager
def importing() -> Iterator[None]:
    """For commands that import hosts: no garbage collection until it has, which takes a fifth of the time, and no
    bitsandbytes.
    """
    _postpone_bitsandbytes()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quiet_hosts() -> None:
    """No progress bars of the hosts where nobody sees them move: not a terminal. Libraries that plugins know are told
    what they would otherwise find out aloud.
    """
    from arctic_plugins.discovery import process_registry

    for name, value in process_registry().load_environment().items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


class _Postponed(ModuleType):
    """A module that is executed when something of it is used for the first time."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__path__ = self.__spec__.submodule_search_locations  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _postpone_bitsandbytes() -> None:
    """Execute bitsandbytes when something of it is used: where it is installed PEFT imports it (peft/helpers.py,
    0.21.2), and it torch's compiler, which takes longer than all of PEFT. Python's ``LazyLoader`` does it at the next
    ``import`` already (3.11)."""
    if "bitsandbytes" not in sys.modules and (spec := find_spec("bitsandbytes")) is not None:
        module = sys.modules["bitsandbytes"] = _Postponed("bitsandbytes")
        module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
