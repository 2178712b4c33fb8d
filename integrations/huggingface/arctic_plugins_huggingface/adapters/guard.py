"""The only patch of PEFT: :mod:`arctic_plugins_huggingface.adapters.tuners` creates adapters over frozen modules.

Read in peft 0.21.2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from arctic_plugins.patches import patch

__all__ = ["guard_tuners"]

_MODULE = "peft.tuners.tuners_utils"


def guard_tuners() -> None:
    """Make PEFT create all adapters within :func:`arctic_plugins_huggingface.adapters.tuners.over_frozen`.

    PEFT is patched now, or when it is imported. All tuners that put layers into a model do so in
    ``BaseTuner.inject_adapter``. Models without frozen modules are left to PEFT alone.
    """
    if _MODULE in sys.modules:
        _guard(sys.modules[_MODULE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _guard(tuners_utils: ModuleType) -> None:
    tuner = getattr(tuners_utils, "BaseTuner", None)  # None while another thread is importing it
    if tuner is not None:
        patch(
            tuner,
            "inject_adapter",
            why="PEFT's layers cannot handle the bytes of frozen modules, and it accepts other layers only for LoRA",
            read_in="peft 0.21.2",
        )(_inject_adapter)


def _inject_adapter(stock: Any, self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    from arctic_plugins_huggingface.adapters.tuners import over_frozen

    with over_frozen(self, model, adapter_name):
        stock(self, model, adapter_name, *args, **kwargs)


class _WhenImported(MetaPathFinder):
    """Import hook that patches PEFT once it has been executed. It finds no modules itself.

    Importing PEFT takes seconds, and most programs do not need it.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_guard(module: ModuleType) -> None:
                execute(module)
                _guard(module)

            spec.loader.exec_module = execute_and_guard  # type: ignore[method-assign]
        return spec
