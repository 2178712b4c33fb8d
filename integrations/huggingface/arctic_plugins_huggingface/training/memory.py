"""The memory that a run keeps on its device, computed from shapes."""

from __future__ import annotations

import copy

from torch import nn

from arctic_plugins_huggingface.adapters.embeddings import add_embeddings
from arctic_plugins_huggingface.loading.plan import ModelPlan
from arctic_plugins_huggingface.loading.weights import freeze_modules, split_weight

__all__ = ["plan_memory"]

ADAMW = ("adamw_torch", "adamw_torch_fused", "OptimizerNames.ADAMW_TORCH", "OptimizerNames.ADAMW_TORCH_FUSED")


def plan_memory(plan: ModelPlan, optim: str) -> tuple[nn.Module, dict[str, int]]:
    """Transform the model with its stack, without data, and count bytes.

    Args:
        plan: the model, which stays as it is.
        optim: as in ``TrainingArguments``.

    Returns:
        The transformed model on the meta device, and the bytes on the compute device in one process, without
            activations: ``base``, ``trainable``, ``gradients`` and, for the AdamW family, ``optimizer``.
    """
    weights, model = plan.weights, copy.deepcopy(plan.skeleton)
    base = sum(parameter.nbytes for parameter in model.parameters())
    base += sum(
        weights.resident[name] - model.get_parameter(".".join(split_weight(name, weights.specs[name]))).nbytes
        for name in weights.codecs
    )
    freeze_modules(model, weights.codecs, {}, device="meta")
    if plan.new_token_ids:
        add_embeddings(model, plan.new_token_ids)
    transformed: nn.Module = plan.stack.hf_transform_model(model)
    trained = sum(parameter.nbytes for parameter in transformed.parameters() if parameter.requires_grad)
    sizes = {"base": base, "trainable": trained, "gradients": trained}
    if str(optim) in ADAMW:
        sizes["optimizer"] = 2 * trained
    return transformed, sizes
