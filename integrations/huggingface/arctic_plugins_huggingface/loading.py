"""Loading: a checkpoint and a stack become a model, encoded tensor by tensor as the bytes come off the disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from arctic_plugins.claims import Claims, LinearSpec, compress_names
from arctic_plugins.errors import ArcticError, CheckpointError, ClaimError
from arctic_plugins.frozen import METHOD, Codec, FrozenLinear, ModuleCodecs, Placement, describe_codec
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.checkpoints import check_checkpoint, check_encoded, hub_arguments, reason
from arctic_plugins_huggingface.quantizer import ArcticQuantizationConfig, ArcticQuantizer, register

__all__ = ["claims", "freeze", "is_encoded", "load_config", "load_model", "load_tokenizer", "only_hub", "skeleton"]

logger = logging.getLogger(__name__)


def load_model(
    checkpoint: str | Path, stack: Stack | None = None, *, dtype: torch.dtype | str = "auto", **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model through ``stack``: configured, encoded and transformed by its plugins.

    Args:
        checkpoint: directory or hub id; plain, or encoded by :func:`~arctic_plugins_huggingface.save_checkpoint`.
        stack: what to apply; ``None`` applies nothing, and loads an encoded checkpoint as it is.
        dtype: compute dtype, and that of what is not encoded; ``"auto"`` is the checkpoint's.
        **kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` verbatim.

    Returns:
        The model (a ``PeftModel`` if a plugin adds an adapter), in evaluation mode, and its tokenizer.

    Raises:
        UserError: everything that can be known to fail is raised before weights are read: host versions, clashing claims, an encoded checkpoint
            that the stack would encode differently.
        CheckpointError: weights are missing, or a tensor does not fit.
    """
    register()
    stack = stack or Stack()
    stack.check_host("transformers")
    if "gguf_file" not in kwargs:
        kwargs.setdefault("use_safetensors", True)  # never a pickle unless the user asks for one
    kwargs = check_checkpoint(checkpoint, **kwargs)
    config = kwargs.pop("config", None) or load_config(checkpoint, **only_hub(kwargs))
    tokenizer = load_tokenizer(checkpoint, **only_hub(kwargs))
    stack.hf_configure_model(config)
    for warning in stack.validate(config, "cuda" if torch.cuda.is_available() else "cpu"):
        logger.warning(warning)
    quantization = _quantization(config, stack, Path(checkpoint) / kwargs.get("subfolder", ""), kwargs.get("variant"))
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint, config=config, dtype=dtype, quantization_config=quantization, output_loading_info=True, **kwargs
        )
    except (ArcticError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a damaged file does to the loader can be anything
        if quantization is not None and quantization.failure is not None:  # the loader collects errors and reports that there were some
            raise quantization.failure from error
        raise CheckpointError(f"{checkpoint} cannot be loaded: {reason(error)}", fix="'--traceback' shows more") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{checkpoint} lacks {len(missing)} weights of its model, {missing[0]} for one", fix="the checkpoint is incomplete: make it again"
        )
    for line in encoding_report(model):
        logger.info("%s", line)
    return stack.hf_transform_model(model), tokenizer


def encoding_report(model: nn.Module) -> list[str]:
    """A line for every linear module and how it is encoded; layers that are encoded alike share one."""
    modules = {name: module for name in linear_modules(model) if isinstance(module := model.get_submodule(name), nn.Linear)}
    kinds = {
        name: describe_codec(module.codec) if isinstance(module, FrozenLinear) else f"plain {module.weight.dtype}" for name, module in modules.items()
    }
    return [f"{pattern}: {kind}" for pattern, kind in compress_names(kinds, modules).items()]


def load_config(checkpoint: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """Read the config of a checkpoint directory or hub id.

    Raises:
        CheckpointError: there is none, or it is not a model's.
    """
    register()
    try:
        return AutoConfig.from_pretrained(checkpoint, **kwargs)
    except Exception as error:  # configs are code: a bad value can raise anything
        raise CheckpointError(
            f"{checkpoint}/config.json cannot be read as a model: {reason(error)}", expected="a causal language model", fix="correct the key it names"
        ) from error


def load_tokenizer(checkpoint: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a checkpoint directory or hub id; raises CheckpointError when there is none or it is damaged."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint, **kwargs)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(f"the tokenizer of {checkpoint} cannot be read: {reason(error)}", fix="save it beside the model again") from error


def is_encoded(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint of ``config`` holds weights encoded by this project."""
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else getattr(quantization, "quant_method", None)
    return method == METHOD


def freeze(model: PreTrainedModel, stack: Stack) -> PreTrainedModel:
    """Encode a loaded, plain model in place, one module at a time, as loading it through ``stack`` would have done.

    Raises:
        ClaimError: see :meth:`arctic_plugins.stack.Stack.claim`.
        CodecError: a weight holds NaN or Inf; names it.
    """
    register()
    modules = linear_modules(model)
    quantization = _as_quantization(stack.claim(model.config, modules), modules)
    if quantization is None:
        return model
    quantizer = ArcticQuantizer(quantization)
    quantizer.codecs = {name: codec for name in modules if (codec := quantization.codecs.codec_of(name))}
    for name in quantizer.codecs:
        linear = model.get_submodule(name)
        frozen = quantizer.freeze(linear, name)
        frozen.encode(linear.weight)
        model.set_submodule(name, frozen)
    # What from_pretrained would have left behind: save_pretrained, the Trainer and PEFT look for these.
    model.config.quantization_config = quantization
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    return model


def linear_modules(model: nn.Module) -> dict[str, LinearSpec]:
    """Dotted name -> shape of every linear module that a plugin may claim, on the meta device or loaded."""
    tied = {name.removesuffix(".weight") for name in (getattr(model, "all_tied_weights_keys", None) or {})}
    return {
        name: LinearSpec(module.out_features, module.in_features, module.bias is not None, name in tied)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, FrozenLinear)
    }


def _quantization(config: PreTrainedConfig, stack: Stack, directory: Path, variant: str | None) -> ArcticQuantizationConfig | None:
    """What the stack claims of this model; for an encoded checkpoint, nothing but the check that it claims the same."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not is_encoded(config):
        if stack.only("weight_codec"):
            raise ClaimError("the checkpoint is quantized by another method", expected="a plain checkpoint", fix="leave the codec plugin out")
        return None
    modules, claimed, codecs = claims(config, stack)
    if quantization is not None:
        if directory.is_dir():
            check_encoded(directory, {name: spec.shape for name, spec in modules.items()}, codecs, variant)
        # The host builds its quantizer from this dict; an argument of from_pretrained it would only compare.
        stored = ModuleCodecs.from_owners(codecs, modules).to_config()
        config.quantization_config = {**stored, "placements": _placements(claimed, codecs)}
        return None
    return _as_quantization(claimed, modules)


def _as_quantization(claims: Claims, modules: Mapping[str, LinearSpec]) -> ArcticQuantizationConfig | None:
    codecs = claims.exclusive("weight_codec")
    placements = _placements(claims, codecs)
    return ArcticQuantizationConfig.from_owners(codecs, modules, placements) if codecs else None


def _placements(claims: Claims, codecs: Mapping[str, Codec]) -> dict[str, Placement]:
    placements = claims.by_slot.get("placement", {})
    if plain := sorted(placements.keys() - codecs.keys()):
        raise ClaimError(f"a placement is claimed for {plain[0]}, whose weight no codec encodes", fix="add a codec plugin, fp8 for instance")
    if chained := [name for name, chain in placements.items() if len(chain) > 1]:
        raise ClaimError(f"two placements are claimed for {chained[0]}, which cannot be chained yet", fix="leave one of the two plugins out")
    return {name: chain[0] for name, chain in placements.items()}


def claims(config: PreTrainedConfig, stack: Stack) -> tuple[dict[str, LinearSpec], Claims, dict[str, Codec]]:
    """What ``stack`` claims of the model of ``config``, and module name -> codec: the claimed ones, or those of an encoded checkpoint.

    Raises:
        ClaimError: plugins clash, or the stack would encode otherwise what the checkpoint has encoded already.
    """
    modules = linear_modules(skeleton(config))
    claimed = stack.claim(config, modules)
    codecs = claimed.exclusive("weight_codec")
    if not is_encoded(config):
        return modules, claimed, codecs
    quantization = config.quantization_config
    existing = ModuleCodecs.from_config(quantization if isinstance(quantization, Mapping) else quantization.to_dict())
    stored = {name: codec for name in modules if (codec := existing.codec_of(name))}
    if codecs and codecs != stored:
        name = next(name for name in modules if codecs.get(name) != stored.get(name))
        raise ClaimError(
            f"the checkpoint has {stored.get(name) or 'a plain weight'} at {name}, but the stack wants {codecs.get(name) or 'a plain weight'}",
            fix="start from the plain checkpoint, or give the codec plugin the options with which this one was made",
        )
    if existing.modules and not stored:
        raise CheckpointError("quantization_config.modules matches no linear module of this model", fix="config.json is of another model")
    return modules, claimed, stored


def skeleton(config: PreTrainedConfig, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """The model of ``config`` on the meta device: shapes without data.

    Raises:
        CheckpointError: no causal language model can be built from it.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype in (None, "auto") else dtype)
    except Exception as error:  # models are code: a bad size can raise anything
        raise CheckpointError(
            f"no causal language model can be built from config.json (model_type {config.model_type}): {reason(error)}", fix="correct config.json"
        ) from error


def only_hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``from_pretrained``'s arguments that also says where a config and a tokenizer come from."""
    return {**hub_arguments(kwargs), **{key: kwargs[key] for key in ("trust_remote_code", "gguf_file") if key in kwargs}}
