"""Stop a run that diverges before the step that would corrupt its weights, or skip that step.

Read in transformers 5.19.0.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from arctic_plugins.errors import ConfigError, Diverged
from arctic_plugins_huggingface.files.check import complete_checkpoints

__all__ = ["FiniteGuard", "FiniteSteps", "anywhere"]

logger = logging.getLogger(__name__)

MOST_SKIPPED = 10
"""Maximum number of steps skipped in a row; one more, and the run counts as diverged even with ``skip``."""


class FiniteGuard(TrainerCallback):
    """Callback that raises :class:`~arctic_plugins.errors.Diverged` at the first step with NaN or infinity.

    It checks the loss and the gradients of each step before the optimizer uses them, and the trainable weights before
    they are saved. If there are several processes, all of them raise, whichever found it.

    On its own, the Trainer leaves NaN out of the losses that it logs (``logging_nan_inf_filter``), continues, and saves
    whatever the weights have become. With float16 autocast, only the loss counts: the gradient scaler handles infinite
    gradients by skipping the step. With DeepSpeed too, only the loss counts, because its gradients are not accessible
    here. The check synchronizes with the device once per step.

    Args:
        trainer: the trainer that gets this callback; its class must include :class:`FiniteSteps`.
        skip: skip such a step with a warning, and raise only after more than :data:`MOST_SKIPPED` in a row.

    Raises:
        ConfigError: if ``skip`` is used with DeepSpeed, whose optimizer step cannot be prevented.
    """

    def __init__(self, trainer: Trainer, *, skip: bool = False) -> None:
        if skip and trainer.is_deepspeed_enabled:
            raise ConfigError(
                "nonfinite is 'skip', but DeepSpeed runs the steps", expected="'stop'", fix="leave 'nonfinite' out"
            )
        self.bad: Tensor | None = None
        """Whether a loss since the last step was not finite; a tensor on the device."""
        self.skip = skip
        self.skipped = 0
        """Steps skipped since the last one that was not."""
        self.only_loss = (
            trainer.args.fp16
            or trainer.is_deepspeed_enabled
            or getattr(trainer.accelerator, "scaler", None) is not None
        )

    def see(self, loss: Tensor) -> None:
        """Record the ``loss`` of a part of a step, without synchronizing with the device."""
        bad = ~loss.detach().isfinite().all()
        self.bad = bad if self.bad is None else self.bad | bad

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        loss, self.bad = self.bad if self.bad is not None else False, None
        gradients = (
            [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            if model is not None
            else []
        )
        bad, spoilt = anywhere(args.device, loss, loss if self.only_loss else _not_finite(gradients))
        if bad and not spoilt:  # for example 0 / 0 in a batch without labels, which changes nothing
            logger.warning("the loss of step %d is not finite, but its gradient is", state.global_step + 1)
        if not spoilt:
            self.skipped = 0
            return
        what = "loss" if bad else "gradient"
        if not self.skip or self.skipped == MOST_SKIPPED:
            raise _diverged(what, args, state.global_step + 1, self.skipped)
        self.skipped += 1
        logger.warning("the %s of step %d is not finite: the step is skipped", what, state.global_step + 1)
        for parameter in (
            model.parameters() if model is not None and not self.only_loss else ()
        ):  # float16's scaler skips the step itself
            parameter.grad = None  # torch's optimizers neither update nor decay a parameter without a gradient

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        last = state.global_step >= state.max_steps or control.should_training_stop
        if model is None or not (last or control.should_save):
            return
        trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
        if anywhere(args.device, _not_finite(trained))[0]:
            raise _diverged("result", args, state.global_step)

    on_epoch_end = on_step_end  # with save_strategy "epoch", only this event shows that a checkpoint follows


class FiniteSteps(Trainer):
    """Mixin that shows the guard the loss of every training step."""

    finite_guard: FiniteGuard

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.finite_guard.see(loss)
        return loss


def _not_finite(tensors: Sequence[Tensor]) -> Tensor | bool:
    """Return whether any value is not finite, using maximum norms to avoid boolean tensors of the same size."""
    finite = [torch.linalg.vector_norm(tensor, torch.inf).isfinite() for tensor in tensors if tensor.numel()]
    return bool(finite) and ~torch.stack([flag.to(finite[0].device) for flag in finite]).all()


def anywhere(device: torch.device, *flags: Tensor | bool) -> list[bool]:
    """Return ``flags``, each true if it is true in any process.

    A process that raised alone would leave the others waiting for it. Flags on the device are read together: the host
    waits for it once, whatever their number, and not at all if there are none and only one process.
    """
    spread = torch.distributed.is_initialized()
    if not spread and not any(isinstance(flag, Tensor) for flag in flags):
        return [bool(flag) for flag in flags]
    tensors = [torch.as_tensor(flag, device=device) for flag in flags]
    shared = torch.stack(tensors).to(torch.float32)
    if spread:
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in shared.tolist()]


def _diverged(what: str, args: TrainingArguments, step: int, skipped: int = 0) -> Diverged:
    output = Path(args.output_dir or ".")
    saved = complete_checkpoints(output)
    newest = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint was saved"
    return Diverged(
        f"the {what} of step {step} is not finite{f', as in the {skipped} steps before it' if skipped else ''}",
        expected="finite numbers: the run diverged, or the data of this step are at fault",
        fix=f"{newest}; lower training.learning_rate, raise training.warmup_steps, or check the data",
    )
