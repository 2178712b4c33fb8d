"""Loading a model through a stack, encoded tensor by tensor as the bytes are read from disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arctic_plugins.claims import compress_names
from arctic_plugins.errors import ArcticError, CheckpointError, ClaimError, one_line
from arctic_plugins.frozen import METHOD, FrozenModule
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.adapters.embeddings import add_embeddings
from arctic_plugins_huggingface.files.check import check_unchanged, is_directory
from arctic_plugins_huggingface.loading.config import is_quantized_otherwise
from arctic_plugins_huggingface.loading.conversions import expert_conversions
from arctic_plugins_huggingface.loading.names import stored_codecs, weight_conversions
from arctic_plugins_huggingface.loading.plan import ModelPlan, plan_model, plan_weights
from arctic_plugins_huggingface.loading.quantizer import ArcticQuantizationConfig, ArcticQuantizer, register
from arctic_plugins_huggingface.loading.tasks import architectures_of, pretrained_part
from arctic_plugins_huggingface.loading.weights import (
    freeze_modules,
    frozen_weights,
    plain_experts,
    split_weight,
    weight_specs,
)

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightTransform

    class _Model(PreTrainedModel):
        """Attributes of models that transformers (``modeling_utils.py``, ``quantizers/base.py``) does not declare."""

        hf_quantizer: ArcticQuantizer | None
        is_quantized: bool
        quantization_method: str
        _weight_conversions: list[WeightTransform]
        arctic_stored_dtype: torch.dtype | None
        """Set by this project: the checkpoint's dtype, if the model's dtype is wider."""


__all__ = ["encoding_report", "freeze", "load_model"]

logger = logging.getLogger(__name__)


def load_model(
    checkpoint: str | Path | ModelPlan,
    stack: Stack | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    new_tokens: Sequence[str] = (),
    auto_class: Any = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model through ``stack``: configured, encoded and transformed by its plugins.

    Args:
        checkpoint: directory or Hub id; plain, or encoded by :func:`~arctic_plugins_huggingface.save_checkpoint`. Or a
            :class:`~arctic_plugins_huggingface.ModelPlan`, which specifies everything else.
        stack: the plugins to apply; ``None`` applies none, and loads an encoded checkpoint as it is.
        dtype: compute dtype, and dtype of weights that are not encoded. ``"auto"`` is the checkpoint's dtype where the
            device multiplies it natively, and float32 elsewhere (:mod:`arctic_plugins.compute`).
            :data:`~arctic_plugins_huggingface.loading.config.STORED` is always the checkpoint's dtype, for models that
            are not computed with. Where ``"auto"`` chose a wider dtype,
            :func:`~arctic_plugins_huggingface.save_checkpoint` converts the weights back to the checkpoint's dtype.
        auto_class: the class of transformers to load with, for example ``AutoModelForSequenceClassification``; by
            default, the one for the class that the checkpoint's ``architectures`` names
            (:data:`~arctic_plugins_huggingface.loading.tasks.TASKS`), or ``AutoModelForCausalLM``. A head that the
            checkpoint lacks because it is of another class is initialized at random, with a warning.
        new_tokens: tokens to add to the tokenizer if it lacks them. Their embeddings are to be trained, as are those of
            all tokens that the checkpoint has no embedding for. Missing embeddings are added, initialized by
            transformers (``mean_resizing``). The plugin ``lora`` trains these rows; in a model without an adapter,
            every row is trained.
        **kwargs: passed to ``from_pretrained`` verbatim, including ``num_labels``, ``id2label`` and ``problem_type``.
            With ``state_dict``, which has the names of a checkpoint, weights come from there; only the config and the
            tokenizer of ``checkpoint`` are then read, not a generation config.

    Returns:
        The model (a ``PeftModel`` if a plugin adds an adapter), in evaluation mode, and its tokenizer. For a model that
        also reads images, its processor, which contains the tokenizer.

    Raises:
        UserError: raised before weights are read, for everything that is known to fail; see
            :func:`~arctic_plugins_huggingface.plan_model`.
        CheckpointError: weights are missing, or a tensor does not fit.
        TypeError: a plan is passed together with further arguments.
    """
    if not isinstance(checkpoint, ModelPlan):
        plan = plan_model(checkpoint, stack, dtype=dtype, auto_class=auto_class, new_tokens=new_tokens, **kwargs)
    elif stack is None and dtype == "auto" and auto_class is None and not kwargs and not new_tokens:
        plan = checkpoint
    else:
        raise TypeError("a ModelPlan specifies how it is loaded: pass stack, dtype and further arguments to plan_model")
    tokenizer = plan.tokenizer
    if not plan.contents_checked and is_directory(plan.checkpoint):
        check_unchanged(Path(plan.checkpoint) / plan.load.get("subfolder", ""))
    for line in (plan.dtype_reason, *plan.warnings):
        if line:
            logger.warning(line)
    quantization = None
    if plan.encoded:
        # transformers builds its quantizer from this dict. It would only compare an argument of from_pretrained to it.
        plan.config.quantization_config = plan.weights.stored_quantization()
    elif not is_quantized_otherwise(plan.config):
        quantization = plan.weights.quantization()
    # from_pretrained takes a checkpoint or a state dict, and auto classes only a checkpoint (5.19.0).
    in_memory = "state_dict" in plan.load
    loader: Any = type(plan.skeleton) if in_memory else plan.auto_class
    try:
        loaded: object = loader.from_pretrained(
            None if in_memory else plan.checkpoint,
            config=plan.config,
            dtype=plan.dtype,
            quantization_config=quantization,
            output_loading_info=True,
            **plan.load,
        )
    except (ArcticError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file can make the loader raise anything
        if quantization is not None and quantization.failure is not None:
            raise quantization.failure from error  # the loader collects errors and only reports that there were some
        raise CheckpointError(
            f"{plan.checkpoint} cannot be loaded: {one_line(error)}", fix="use '--traceback' for details"
        ) from error
    model, report = cast("tuple[_Model, dict[str, Any]]", loaded)  # a pair because of output_loading_info
    if in_memory:
        model.name_or_path = model.config.name_or_path = plan.checkpoint
    _check_missing(plan, model, sorted(report["missing_keys"]))
    _forget_empty_quantization(model)
    widened = plan.asked_dtype == "auto" and plan.stored_dtype != plan.dtype
    model.arctic_stored_dtype = plan.stored_dtype if widened else None
    if any(module.frozen[leaf].handle is not None for module, leaf in frozen_weights(model).values()):
        _let_go_of_files(model)
    if plan.new_token_ids:
        add_embeddings(model, plan.new_token_ids)
    for line in encoding_report(model):
        logger.info("%s", line)
    return plan.stack.hf_transform_model(model), tokenizer


def _check_missing(plan: ModelPlan, model: nn.Module, missing: list[str]) -> None:
    """Raise CheckpointError unless the ``missing`` weights are those of a new head, which is reported.

    transformers has initialized them at random.
    """
    pretrained = pretrained_part(model)
    if lacking := [name for name in missing if not plan.new_head or pretrained(name)]:
        kind = next(iter(architectures_of(plan.config)), "")
        raise CheckpointError(
            f"{plan.checkpoint} lacks {len(lacking)} weights of its model, for example {lacking[0]}",
            fix=f"it is a {kind}, which has no {plan.task}: use another task or checkpoint"
            if plan.new_head and kind
            else "the checkpoint is incomplete: create it again",
        )
    if missing:
        logger.warning(
            "%s has no head for %s: initialized at random, until it is trained or an adapter brings it: %s",
            plan.checkpoint,
            plan.task,
            ", ".join(missing),
        )


def _forget_empty_quantization(model: _Model) -> None:
    """Remove the quantization config if nothing is encoded or placed.

    It only told the loader to keep this process's experts. The model is a plain one, which can be trained as it is.
    """
    quantization = getattr(model.config, "quantization_config", None)
    if isinstance(quantization, ArcticQuantizationConfig) and not quantization.codecs.modules:
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        del model.quantization_method


@torch.no_grad()
def _let_go_of_files(model: nn.Module) -> None:
    """Copy tensors that are still mapped from the checkpoint's files.

    One small tensor keeps its whole file mapped, and all that was read of the file in memory.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def encoding_report(model: nn.Module) -> list[str]:
    """Return a line for every weight and how it is encoded; layers that are encoded alike share a line."""
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
    """Encode a loaded, plain model in place, one module at a time, as if it had been loaded through ``stack``.

    Raises:
        ClaimError: see :meth:`arctic_plugins.stack.Stack.claim`.
        CodecError: a weight contains NaN or Inf; names it.
    """
    register()
    plan = plan_weights(model, model.config, stack, model.dtype)
    if plan.claims.by_slot.get("experts_dispatch"):
        raise ClaimError(
            "experts can only be spread over processes while they are loaded",
            expected="load_model(checkpoint, stack)",
            fix="use it instead of freeze",
        )
    quantization = plan.quantization()
    if quantization is None:
        return model
    quantizer = ArcticQuantizer(quantization)
    quantizer.codecs = stored_codecs(quantization.codecs, plan.stored)
    plain_conversions = weight_conversions(model)
    freeze_modules(model, quantizer.codecs, quantization.placements, until_encoded=True)
    for module, leaf in frozen_weights(model).values():
        module.encode(module.get_parameter(leaf), leaf)
    # Attributes that from_pretrained would have set: save_pretrained, the Trainer and PEFT look for them.
    frozen = cast("_Model", model)
    frozen._weight_conversions = expert_conversions(plain_conversions)
    frozen.config.quantization_config = quantization
    frozen.hf_quantizer, frozen.is_quantized, frozen.quantization_method = quantizer, True, METHOD
    return frozen
