"""The metric ``arctic_plugins_info`` of vLLM's ``/metrics``. Read in vllm 0.32.0."""

from __future__ import annotations

import functools
from typing import Any

from prometheus_client import Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from arctic_plugins_vllm.about import Served, served

__all__ = ["InfoLogger"]

NAME = "arctic_plugins_info"


@functools.cache
def _gauge() -> Gauge:
    """Return the gauge of this process, which prometheus allows to be created only once.

    Not an ``Info``, which does not work with several API servers.
    """
    return Gauge(
        NAME,
        "The stack that this server serves, and the versions of its plugins.",
        labelnames=tuple(Served("").labels("")),
        multiprocess_mode="mostrecent",
    )


class InfoLogger(AggregateStatLoggerBase):
    """Sets ``arctic_plugins_info{model_name, stack, stack_sha256, plugins, version}`` to 1.

    vLLM creates one in every API server, from the entry-point group ``vllm.stat_logger_plugins``.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        model = vllm_config.model_config
        names = model.served_model_name  # one, or a list of which vLLM's own metrics use the first
        labels = served(model.model, vllm_config.additional_config).labels(
            names if isinstance(names, str) else names[0]
        )
        _gauge().labels(**labels).set(1)

    def record(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def log_engine_initialized(self) -> None:
        pass
