"""Liger's kernels for models with encoded weights, adapters, and plugins that replace a part of the computation.

Read in transformers 5.19.0 (``integrations/liger.py``), liger-kernel 0.8.5 (``transformers/monkey_patch.py``,
``model/llama.py``, ``swiglu.py``) and trl 1.16.0 (``trainer/sft_trainer.py``). **Never run on a GPU.**

With ``use_liger_kernel``, ``Trainer.train()`` replaces the ``forward`` of the model, of its MLPs and of its norms. The
MLPs call their linear layers, whatever these are, so encoded weights and adapters work. The fused loss reads the weight
of the head, and the fused experts read theirs: an encoded weight would be multiplied as the bytes that it is, and an
adapter would be ignored. A ``forward`` that a plugin has replaced would be lost.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import is_liger_kernel_available

from arctic_plugins.errors import ConfigError
from arctic_plugins.frozen import FrozenModule

__all__ = ["check_liger", "settle_liger"]

logger = logging.getLogger(__name__)

LOSS = ("fused_linear_cross_entropy",)
MLP = ("swiglu", "geglu")
NORM = ("rms_norm", "layer_norm")
MLPS = ("mlp", "feed_forward", "experts", "block_sparse_moe", "shared_expert")


def check_liger(args: TrainingArguments) -> None:
    """Raise ConfigError if Liger's kernels are asked for and cannot run: no package, or no GPU.

    transformers reports a missing package when training starts, after the model was loaded, and a missing GPU not at
    all until Triton fails.
    """
    if not args.use_liger_kernel:
        return
    if not is_liger_kernel_available():
        raise ConfigError(
            "training.use_liger_kernel is on, but liger-kernel is not installed",
            expected="version 0.3.0 or later",
            fix="run 'pip install liger-kernel', or leave it out",
        )
    if args.use_cpu or not torch.accelerator.is_available():
        raise ConfigError(
            "training.use_liger_kernel is on, but training runs on the CPU",
            expected="a GPU, for which Liger's kernels are compiled",
            fix="leave it out",
        )


def settle_liger(trainer: Trainer) -> None:
    """Turn off those of Liger's kernels that would bypass an encoded weight, an adapter or a plugin, and report it.

    Raises:
        ConfigError: such a kernel is asked for in ``liger_kernel_config``; or see :func:`check_liger`.
    """
    args = trainer.args
    check_liger(args)
    if not args.use_liger_kernel:
        return
    given = dict(args.liger_kernel_config or {})
    assert trainer.model is not None  # ensured by Trainer.__init__
    for kernels, reason in _bypassed(trainer.model).items():
        if asked := [name for name in kernels if given.get(name)]:
            raise ConfigError(
                f"training.liger_kernel_config turns {asked[0]} on, but {reason}", fix=f"leave {asked[0]} out"
            )
        if any(given.get(name) is None for name in kernels):
            logger.warning("Liger's %s is off: %s", " and ".join(kernels), reason)
        given |= dict.fromkeys(kernels, False)
    args.liger_kernel_config = given


def _bypassed(model: nn.Module) -> dict[tuple[str, ...], str]:
    """Return Liger's kernels that cannot be used, with the reason."""
    found: dict[tuple[str, ...], str] = {}
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if "forward" in vars(base):
        found[LOSS] = f"{type(base).__name__} computes its loss in another way already"
    else:
        head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        plain = head.original_module if isinstance(head, ModulesToSaveWrapper) else head
        if plain is not None and _is_special(plain):
            found[LOSS] = f"it reads the weight of the head, and this is {_what(plain)}"
    for name, module in base.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in MLPS and _is_special(module):
            found.setdefault(MLP, f"it reads the weights of {name}, and these are {_what(module)}")
        elif leaf in MLPS and "forward" in vars(module):
            found.setdefault(MLP, f"{name} is computed in another way already")
        elif "norm" in leaf and "forward" in vars(module):
            found.setdefault(NORM, f"{name} is computed in another way already")
    return found


def _is_special(module: nn.Module) -> bool:
    """Return whether the parameters of ``module`` are not simply its weights."""
    return isinstance(module, FrozenModule | BaseTunerLayer) or getattr(module, "dispatch", None) is not None


def _what(module: nn.Module) -> str:
    if isinstance(module, BaseTunerLayer):
        return "adapted"
    return "encoded" if isinstance(module, FrozenModule) else "spread over processes"
