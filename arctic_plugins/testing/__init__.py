"""Tools for plugin authors: the laws of every kind of part, small real models, and real processes to test in.

A suite, such as :class:`CodecSuite`, is subclassed in a test module, and pytest collects its laws. Once
``arctic-plugins`` is installed, pytest has the fixtures of :mod:`arctic_plugins.testing.fixtures`. Importing this
package loads nothing heavy; suites of codecs, placements and dispatches need torch, :class:`PluginSuite` and others the
integrations of the hosts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_plugins._lazy import lazily

if TYPE_CHECKING:
    from arctic_plugins.testing.architectures import ModelSuite
    from arctic_plugins.testing.codecs import CodecSuite, check_codec
    from arctic_plugins.testing.commands import CommandSuite
    from arctic_plugins.testing.dispatches import DispatchSuite
    from arctic_plugins.testing.forks import Fork, Forks, engines, trainers
    from arctic_plugins.testing.gpus import TracedGpu
    from arctic_plugins.testing.hostile import watched
    from arctic_plugins.testing.losses import LossSuite
    from arctic_plugins.testing.models import LLAMA_LIKE, MIXTURES, draw_adapter, tiny_llama, tiny_model
    from arctic_plugins.testing.placements import PlacementSuite
    from arctic_plugins.testing.plugins import PluginSuite
    from arctic_plugins.testing.processes import QUIET_RUN, run_processes, run_python, said, say, small_engine
    from arctic_plugins.testing.ropes import RopeTypeSuite
    from arctic_plugins.testing.suite import Suite

__all__ = [
    "LLAMA_LIKE",
    "MIXTURES",
    "QUIET_RUN",
    "CodecSuite",
    "CommandSuite",
    "DispatchSuite",
    "Fork",
    "Forks",
    "LossSuite",
    "ModelSuite",
    "PlacementSuite",
    "PluginSuite",
    "RopeTypeSuite",
    "Suite",
    "TracedGpu",
    "check_codec",
    "draw_adapter",
    "engines",
    "run_processes",
    "run_python",
    "said",
    "say",
    "small_engine",
    "tiny_llama",
    "tiny_model",
    "trainers",
    "watched",
]

__getattr__ = lazily(
    __name__,
    {
        "codecs": ("CodecSuite", "check_codec"),
        "commands": ("CommandSuite",),
        "dispatches": ("DispatchSuite",),
        "forks": ("Fork", "Forks", "engines", "trainers"),
        "gpus": ("TracedGpu",),
        "hostile": ("watched",),
        "losses": ("LossSuite",),
        "models": ("LLAMA_LIKE", "MIXTURES", "draw_adapter", "tiny_llama", "tiny_model"),
        "architectures": ("ModelSuite",),
        "placements": ("PlacementSuite",),
        "plugins": ("PluginSuite",),
        "processes": ("QUIET_RUN", "run_processes", "run_python", "said", "say", "small_engine"),
        "ropes": ("RopeTypeSuite",),
        "suite": ("Suite",),
    },
)
