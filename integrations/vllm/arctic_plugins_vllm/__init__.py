"""The vLLM host: serves checkpoints with encoded weights. Importing this package loads neither torch nor vLLM."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from arctic_plugins._lazy import lazily

if TYPE_CHECKING:
    from arctic_plugins.registry import ModelClasses
    from arctic_plugins_vllm.checkpoints import on_the_fly
    from arctic_plugins_vllm.serving import engine_args

__all__ = ["engine_args", "on_the_fly", "register"]

__getattr__ = lazily(__name__, {"checkpoints": ("on_the_fly",), "serving": ("engine_args",)})

logger = logging.getLogger(__name__)


def register() -> None:
    """Register this project with vLLM: the ``vllm.general_plugins`` entry point. Idempotent.

    Adds the quantization method ``arctic``, a reader for every format that ``arctic convert`` reads and vLLM does not,
    and the models and RoPE types of plugins that vLLM does not have.

    vLLM calls this function in every process that it starts, without configuration. It ignores errors while importing
    an entry point but not while calling it, so all work that can fail is done here.
    """
    from arctic_plugins.errors import HostVersionError
    from arctic_plugins.resolver import check_hosts

    try:
        check_hosts((), "vllm")
    except HostVersionError as error:
        logger.warning("%s", error)  # an exception would stop vLLM, even for models that do not use this project
    from arctic_plugins_vllm.compat import ModelRegistry, is_registered, register_quantization_config

    if is_registered("arctic"):
        return
    from arctic_plugins.discovery import process_registry
    from arctic_plugins_vllm import checks, refusals, rope, speculation
    from arctic_plugins_vllm.quantization import ArcticConfig, ConvertedConfig

    rope.install()
    speculation.install()
    refusals.install()
    checks.install()
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
    """Register a model's config and tokenizer with transformers' ``Auto`` classes, which vLLM uses to read checkpoints.

    In-tree classes are not replaced.
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
    ) as error:  # an exception would stop vLLM for other models as well; for this one, vLLM reports an unknown model
        logger.warning("model type '%s' is not available: %s cannot be imported: %s", model_type, classes.config, error)
