"""Fit a training run into a time budget."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["StepBudget"]

WARM, TIMED = 1, 3
"""Number of warm-up steps, and of the steps after them whose median time measures the machine's speed."""


class StepBudget(TrainerCallback):
    """Callback that shortens a run and its linear schedule to fit into ``seconds``, but not below ``least`` steps.

    The speed is that of the first steps. Read in transformers 5.19.0: the loop checks ``state.max_steps`` after each
    step, and a linear schedule is a ``LambdaLR`` of a ``partial`` with the keyword ``num_training_steps``. The learning
    rates before the decision are those of the warmup, which does not depend on it.
    """

    def __init__(self, seconds: float, *, least: int) -> None:
        self.seconds, self.least = seconds, least
        self._times: list[float] = []
        self._began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        self._times.append(time.perf_counter() - self._began)
        if len(self._times) != WARM + TIMED:
            return
        steps = self.steps(state.max_steps, statistics.median(self._times[WARM:]))
        if steps < state.max_steps and isinstance(lr_scheduler, LambdaLR):
            lr_scheduler.lr_lambdas = [
                partial(schedule.func, *schedule.args, **{**schedule.keywords, "num_training_steps": steps})
                for schedule in lr_scheduler.lr_lambdas
                if isinstance(schedule, partial)
            ]
            state.max_steps = args.max_steps = steps

    def steps(self, planned: int, seconds_per_step: float) -> int:
        """Return how many of the ``planned`` steps to run."""
        return min(planned, max(self.least, int(self.seconds / seconds_per_step)))
