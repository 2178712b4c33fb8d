"""Models and experts functions that installed plugins add to transformers.

Read in transformers 5.19.0 (``models/auto``, ``conversion_mapping.py``).
"""

from __future__ import annotations

import transformers
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from arctic_plugins.discovery import process_registry
from arctic_plugins.registry import load

__all__ = ["register_models"]


def register_models() -> None:
    """Register the models and experts functions of installed plugins with transformers.

    Names that transformers already has keep their meaning. Idempotent.
    """
    registry = process_registry()
    for name, function in registry.experts_functions().items():
        if name not in ALL_EXPERTS_FUNCTIONS:
            ALL_EXPERTS_FUNCTIONS.register(name, function)
    for model_type, classes in registry.models.items():
        # Only transformers' own names: the vLLM integration may already have registered the config.
        if model_type in CONFIG_MAPPING_NAMES:
            continue
        config, base = load(classes.config), load(classes.base)
        if config in MODEL_MAPPING:
            continue
        AutoConfig.register(model_type, config)
        AutoModel.register(config, base)
        AutoModelForCausalLM.register(config, load(classes.causal_lm))
        for auto_class, target in classes.heads.items():
            getattr(transformers, auto_class).register(config, load(target))
        if classes.tokenizer is not None:
            AutoTokenizer.register(config, tokenizer_class=load(classes.tokenizer))
        if hasattr(base, "checkpoint_conversions"):
            register_checkpoint_conversion_mapping(model_type, base.checkpoint_conversions())
