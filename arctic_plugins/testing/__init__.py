"""Tools for plugin authors: checks that a part obeys its protocol, small real models, and real processes to test in.

``pytest -p arctic_plugins.testing.fixtures`` adds the fixtures. :func:`check_codec`, :func:`check_placement` and
:func:`check_dispatch` need torch; :func:`tiny_model` needs transformers.
"""

from arctic_plugins.testing.codecs import CodecSuite, check_codec
from arctic_plugins.testing.dispatches import DispatchSuite
from arctic_plugins.testing.forks import Fork, Forks, engines, trainers
from arctic_plugins.testing.gpus import TracedGpu
from arctic_plugins.testing.hostile import watched
from arctic_plugins.testing.models import LLAMA_LIKE, MIXTURES, draw_adapter, tiny_llama, tiny_model
from arctic_plugins.testing.placements import PlacementSuite
from arctic_plugins.testing.processes import QUIET_RUN, run_processes, run_python, said, say, small_engine

__all__ = [
    "LLAMA_LIKE",
    "MIXTURES",
    "QUIET_RUN",
    "CodecSuite",
    "DispatchSuite",
    "Fork",
    "Forks",
    "PlacementSuite",
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
