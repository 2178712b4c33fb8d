"""Loading: a checkpoint and a stack become a model, encoded tensor by tensor as the bytes come off the disk."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from arctic_plugins.claims import compress_names
from arctic_plugins.errors import ArcticError, CheckpointError, ClaimError, ConfigError
from arctic_plugins.files import check_elements
from arctic_plugins.frozen import (
    METHOD,
    FrozenModule,
    ModuleCodecs,
)
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.files.check import check_checkpoint, check_encoded, reason
from arctic_plugins_huggingface.loading.config import (
    _device_of,
    is_encoded,
    load_config,
    load_tokenizer,
    only_hub,
    resolve_dtype,
    stored_dtype,
)
from arctic_plugins_huggingface.loading.conversions import expert_conversions
from arctic_plugins_huggingface.loading.names import stored_codecs, stored_names, weight_conversions
from arctic_plugins_huggingface.loading.plan import _owners, _place, claims
from arctic_plugins_huggingface.loading.quantizer import ArcticQuantizationConfig, ArcticQuantizer, register
from arctic_plugins_huggingface.loading.weights import (
    freeze_modules,
    frozen_weights,
    plain_experts,
    split_weight,
    weight_specs,
)

__all__ = ["freeze", "load_model"]

logger = logging.getLogger(__name__)


def load_model(
    checkpoint: str | Path,
    stack: Stack | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model through ``stack``: configured, encoded and transformed by its plugins.

    Args:
        checkpoint: directory or hub id; plain, or encoded by :func:`~arctic_plugins_huggingface.save_checkpoint`.
        stack: what to apply; ``None`` applies nothing, and loads an encoded checkpoint as it is.
        dtype: compute dtype, and that of what is not encoded; ``"auto"`` is the checkpoint's where the device
            multiplies it natively, otherwise float32 (:mod:`arctic_plugins.compute`); :data:`STORED` the checkpoint's
            in any case, for what is not computed with. :func:`~arctic_plugins_huggingface.save_checkpoint` writes what
            ``"auto"`` made wider in the checkpoint's dtype again.
        tokenizer: the checkpoint's, if it was loaded already.
        **kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` verbatim.

    Returns:
        The model (a ``PeftModel`` if a plugin adds an adapter), in evaluation mode, and its tokenizer.

    Raises:
        UserError: everything that can be known to fail is raised before weights are read: host versions, clashing
            claims, an encoded checkpoint that the stack would encode differently.
        CheckpointError: weights are missing, or a tensor does not fit.
    """
    register()
    stack = stack or Stack()
    stack.check_host("transformers")
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "training is configured for DeepSpeed's ZeRO stage 3, which splits weights while they are loaded",
            expected="stage 1 or 2; the 'shard' plugin spreads frozen weights, 'moe' experts",
            fix="correct zero_optimization.stage",
        )
    kwargs.setdefault("trust_remote_code", False)
    if "gguf_file" not in kwargs:
        kwargs.setdefault("use_safetensors", True)  # never a pickle unless the user asks for one
    kwargs = check_checkpoint(checkpoint, **kwargs)
    config = kwargs.pop("config", None) or load_config(checkpoint, **only_hub(kwargs))
    tokenizer = tokenizer or load_tokenizer(checkpoint, **only_hub(kwargs))
    stored, asked_dtype = stored_dtype(config), dtype
    dtype, line = resolve_dtype(stored, dtype, _device_of(kwargs))
    if line:
        logger.warning(line)
    stack.hf_configure_model(config)
    for warning in stack.validate(config, "cuda" if torch.cuda.is_available() else "cpu"):
        logger.warning(warning)
    asked = kwargs.get("experts_implementation")
    quantization = _quantization(
        config, stack, asked_dtype, Path(checkpoint) / kwargs.get("subfolder", ""), kwargs.get("variant"), asked
    )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint, config=config, dtype=dtype, quantization_config=quantization, output_loading_info=True, **kwargs
        )
    except (ArcticError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a damaged file does to the loader can be anything
        if (
            quantization is not None and quantization.failure is not None
        ):  # the loader collects errors and reports that there were some
            raise quantization.failure from error
        raise CheckpointError(
            f"{checkpoint} cannot be loaded: {reason(error)}", fix="'--traceback' shows more"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{checkpoint} lacks {len(missing)} weights of its model, {missing[0]} for one",
            fix="the checkpoint is incomplete: make it again",
        )
    _forget_empty_quantization(model)
    model.arctic_stored_dtype = stored if asked_dtype == "auto" and stored != dtype else None
    if any(module.frozen[leaf].handle is not None for module, leaf in frozen_weights(model).values()):
        _let_go_of_files(model)
    for line in encoding_report(model):
        logger.info("%s", line)
    return stack.hf_transform_model(model), tokenizer


def _forget_empty_quantization(model: PreTrainedModel) -> None:
    """The loader was told to keep some experts only, and nothing is encoded or placed: the model is a plain one, which
    can be trained as it is.
    """
    quantization = getattr(model.config, "quantization_config", None)
    if isinstance(quantization, ArcticQuantizationConfig) and not quantization.codecs.modules:
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        del model.quantization_method


@torch.no_grad()
def _let_go_of_files(model: nn.Module) -> None:
    """Copy what is still mapped from the checkpoint: one small tensor keeps all of its file mapped, and what was read
    of it in memory.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def encoding_report(model: nn.Module) -> list[str]:
    """A line for every weight and how it is encoded; layers that are encoded alike share one."""
    kinds: dict[str, str] = {}
    for name, spec in weight_specs(model).items():
        path, leaf = split_weight(name, spec)
        module = model.get_submodule(path)
        frozen = module.frozen.get(leaf) if isinstance(module, FrozenModule) else None
        kinds[name] = f"plain {getattr(module, leaf).dtype}" if frozen is None else frozen.codec.describe()
        if frozen is not None and frozen.placement is not None:
            kinds[name] += f", {frozen.placement.describe()}"
    kinds |= {name: f"plain, {why}" for name, why in plain_experts(model).items()}
    return [f"{pattern}: {kind}" for pattern, kind in compress_names(kinds, kinds).items()]


def freeze(model: PreTrainedModel, stack: Stack) -> PreTrainedModel:
    """Encode a loaded, plain model in place, one module at a time, as loading it through ``stack`` would have done.

    Raises:
        ClaimError: see :meth:`arctic_plugins.stack.Stack.claim`.
        CodecError: a weight holds NaN or Inf; names it.
    """
    register()
    specs = weight_specs(model)
    stored = stored_names(model, specs)
    claimed = stack.claim(model.config, specs)
    codecs = claimed.exclusive("weight_codec")
    if claimed.by_slot.get("experts_dispatch"):
        raise ClaimError(
            "experts are spread over processes while they are loaded",
            expected="load_model(checkpoint, stack)",
            fix="use it",
        )
    if not codecs:
        return model
    quantization = ArcticQuantizationConfig.from_owners(*_owners(codecs, stored), _place(claimed, codecs, specs)[0])
    quantizer = ArcticQuantizer(quantization)
    quantizer.codecs = stored_codecs(quantization.codecs, stored)
    plain_conversions = weight_conversions(model)
    freeze_modules(model, quantizer.codecs, quantization.placements, until_encoded=True)
    for module, leaf in frozen_weights(model).values():
        module.encode(module.get_parameter(leaf), leaf)
    # What from_pretrained would have left behind: save_pretrained, the Trainer and PEFT look for these.
    model._weight_conversions = expert_conversions(plain_conversions)
    model.config.quantization_config = quantization
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    return model


def _quantization(
    config: PreTrainedConfig,
    stack: Stack,
    dtype: torch.dtype | str,
    directory: Path,
    variant: str | None,
    experts_implementation: str | None,
) -> ArcticQuantizationConfig | None:
    """What the stack claims of this model; for an encoded checkpoint, nothing but the check that it claims the same."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not is_encoded(config):
        if owners := [*stack.only("weight_codec"), *stack.only("placement")]:
            raise ClaimError(
                "the checkpoint is quantized by another method",
                expected="a plain checkpoint",
                fix=f"leave the plugin '{owners[0].name}' out",
            )
        return None
    claimed = claims(config, stack, dtype)
    if weights := sorted(directory.glob("*.safetensors")):
        check_elements(claimed.elements, weights, directory / "config.json")
    wanted = {dispatch.experts_implementation for dispatch in claimed.dispatches.values()}
    if wanted and experts_implementation not in {None, *wanted}:
        raise ConfigError(
            f"experts_implementation is '{experts_implementation}', and a plugin dispatches experts",
            expected=f"'{min(wanted)}'",
            fix="leave it out",
        )
    if quantization is not None:
        if directory.is_dir():
            check_encoded(directory, claimed.on_disk(), variant)
        # The host builds its quantizer from this dict; an argument of from_pretrained it would only compare.
        stored = ModuleCodecs.from_owners(*_owners(claimed.codecs, claimed.stored)).to_config()
        config.quantization_config = {**stored, "placements": claimed.placements, "dispatches": claimed.dispatches}
        return None
    return claimed.quantization()
