"""The vLLM host: serves checkpoints with encoded weights. Importing this loads neither torch nor vLLM."""

from __future__ import annotations

import logging

__all__ = ["register"]

logger = logging.getLogger(__name__)

TESTED = ">=0.32,<0.33"


def register() -> None:
    """The ``vllm.general_plugins`` entry point: adds the quantization method ``arctic``. Idempotent.

    vLLM calls it in every process that it starts, without configuration. It swallows errors of the import of an entry point but not those of its
    call, so all work, and all that can fail, is in here.
    """
    from packaging.specifiers import SpecifierSet

    from arctic_plugins.resolver import host_version

    found = host_version("vllm")
    if found is not None and not SpecifierSet(TESTED).contains(found[1], prereleases=True):
        logger.warning("arctic-plugins-vllm was tested with vllm %s and runs on %s %s: reinstall one of the two if it fails", TESTED, *found)
    from arctic_plugins_vllm.compat import is_registered, register_quantization_config

    if not is_registered("arctic"):
        from arctic_plugins_vllm.quantization import ArcticConfig

        register_quantization_config("arctic")(ArcticConfig)
