"""The vLLM host: serves checkpoints with encoded weights. Importing this loads neither torch nor vLLM."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arctic_plugins.registry import ModelClasses

__all__ = ["register"]

logger = logging.getLogger(__name__)


def register() -> None:
    """The ``vllm.general_plugins`` entry point: adds the quantization method ``arctic``, a reader for every format that
    ``arctic convert`` reads and vLLM does not, and plugins' models and RoPE types that vLLM does not have. Idempotent.

    vLLM calls it in every process that it starts, without configuration. It swallows errors of the import of an entry
    point but not those of its call, so all work, and all that can fail, is in here.
    """
    from arctic_plugins.errors import HostVersionError
    from arctic_plugins.resolver import check_hosts

    try:
        check_hosts((), "vllm")
    except HostVersionError as error:
        logger.warning(
            "%s", error
        )  # vLLM would be stopped by an exception, also for models that have nothing to do with us
    from arctic_plugins_vllm.compat import ModelRegistry, is_registered, register_quantization_config

    if is_registered("arctic"):
        return
    from arctic_plugins.discovery import process_registry
    from arctic_plugins_vllm import rope
    from arctic_plugins_vllm.quantization import ArcticConfig, ConvertedConfig

    rope.install()
    register_quantization_config("arctic")(ArcticConfig)
    for name in process_registry().converter_names():
        if not is_registered(name):
            register_quantization_config(name)(ConvertedConfig.of(name))
    known = ModelRegistry.get_supported_archs()
    for model_type, classes in process_registry().models.items():
        _register_config(model_type, classes)
        if (architecture := classes.causal_lm.partition(":")[2]) not in known:
            ModelRegistry.register_model(architecture, classes.vllm)


def _register_config(model_type: str, classes: ModelClasses) -> None:
    """Make transformers' ``Auto`` classes, with which vLLM reads checkpoints, know a model's config and tokenizer; what
    they have in-tree stays.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # in-tree ones only, in 5.19.0

    from arctic_plugins.registry import load

    if model_type in CONFIG_MAPPING_NAMES:
        return
    try:
        AutoConfig.register(model_type, config := load(classes.config), exist_ok=True)
        if classes.tokenizer is not None:
            AutoTokenizer.register(config, tokenizer_class=load(classes.tokenizer), exist_ok=True)
    except (
        ImportError,
        AttributeError,
    ) as error:  # vLLM would be stopped, also for other models; for this one it says that it does not know it
        logger.warning("model type '%s' is not available: %s cannot be imported: %s", model_type, classes.config, error)
