"""A run that diverges stops before the step that would spoil its weights. Read in transformers 5.19.0."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from arctic_plugins.errors import Diverged
from arctic_plugins_huggingface.checkpoints import complete_checkpoints

__all__ = ["FiniteGuard"]

logger = logging.getLogger(__name__)


class FiniteGuard(TrainerCallback):
    """Raises :class:`~arctic_plugins.errors.Diverged` at the first step whose loss or gradients hold NaN or infinity, before the optimizer uses them,
    and before trainable weights that do are saved.

    The Trainer by itself leaves NaN out of the losses that it logs (``logging_nan_inf_filter``), goes on, and saves what has become of the weights.
    With float16 autocast, infinite gradients are the scaler's business, which leaves the step out, and only the loss counts; so it is with DeepSpeed,
    whose gradients are not here. The device is waited for once a step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.bad: Tensor | None = None
        """Whether a loss since the last step was not finite, on the device."""
        self.only_loss = trainer.args.fp16 or trainer.is_deepspeed_enabled or getattr(trainer.accelerator, "scaler", None) is not None
        step = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = step(*args, **kwargs)
            bad = ~loss.detach().isfinite().all()
            self.bad = bad if self.bad is None else self.bad | bad
            return loss

        trainer.training_step = training_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        bad, self.bad = self.bad is not None and bool(self.bad), None
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None] if model is not None else []
        if self.only_loss:
            spoilt = bad
        else:
            spoilt = not _are_finite(gradients)
            if bad and not spoilt:  # 0 / 0 of a batch without labels, which changes nothing
                logger.warning("the loss of step %d is not finite, but its gradient is", state.global_step + 1)
        if spoilt:
            raise _diverged("loss" if bad else "gradient", args, state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        last = state.global_step >= state.max_steps or control.should_training_stop
        saves = model is not None and (last or control.should_save)
        if saves and not _are_finite([parameter.detach() for parameter in model.parameters() if parameter.requires_grad]):  # type: ignore[union-attr]
            raise _diverged("result", args, state.global_step)

    on_epoch_end = on_step_end  # with save_strategy "epoch" it is known only then that a checkpoint follows


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    """By their largest magnitudes: no tensors of truth values of their size."""
    finite = [torch.linalg.vector_norm(tensor, torch.inf).isfinite() for tensor in tensors if tensor.numel()]
    return not finite or bool(torch.stack([flag.to(finite[0].device) for flag in finite]).all())


def _diverged(what: str, args: TrainingArguments, step: int) -> Diverged:
    output = Path(args.output_dir or ".")
    saved = complete_checkpoints(output)
    newest = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint was saved"
    return Diverged(
        f"the {what} of step {step} is not finite",
        expected="numbers: the run diverged, or the data of this step are at fault",
        fix=f"{newest}; lower training.learning_rate, lengthen training.warmup_steps, or look at the data",
    )
