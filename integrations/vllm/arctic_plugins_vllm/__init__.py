"""The vLLM host: serves checkpoints with encoded weights. Importing this loads neither torch nor vLLM."""

from __future__ import annotations

import logging

__all__ = ["register"]

logger = logging.getLogger(__name__)


def register() -> None:
    """The ``vllm.general_plugins`` entry point: adds the quantization method ``arctic``, and a reader for every format that
    ``arctic convert`` reads and vLLM does not. Idempotent.

    vLLM calls it in every process that it starts, without configuration. It swallows errors of the import of an entry point but not those of its
    call, so all work, and all that can fail, is in here.
    """
    from arctic_plugins.errors import HostVersionError
    from arctic_plugins.resolver import check_hosts

    try:
        check_hosts((), "vllm")
    except HostVersionError as error:
        logger.warning("%s", error)  # vLLM would be stopped by an exception, also for models that have nothing to do with us
    from arctic_plugins_vllm.compat import is_registered, register_quantization_config

    if is_registered("arctic"):
        return
    from arctic_plugins.discovery import process_registry
    from arctic_plugins_vllm.quantization import ArcticConfig, ConvertedConfig

    register_quantization_config("arctic")(ArcticConfig)
    for name in process_registry().converter_names():
        if not is_registered(name):
            register_quantization_config(name)(ConvertedConfig.of(name))
