"""Output of a training run: a progress bar on a terminal, a line for each log elsewhere, and a summary at the end."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from arctic_plugins_huggingface.training.result import TrainingResult

__all__ = ["TrainingProgress", "memory", "peak_memory", "progress_bar", "show_summary"]


def progress_bar(console: Console) -> Progress:
    """Return a progress bar with the steps done, a short text, the elapsed time and the remaining time."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(TextColumn("{task.description}"), *columns, console=console)


def memory() -> int:
    """Return the bytes in use: allocated on the GPU, or resident in this process if there is none."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def peak_memory() -> int:
    """Return the most bytes in use so far: allocated on the GPU, or resident in this process if there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class TrainingProgress(TrainerCallback):
    """Callback that shows loss, tokens per second, memory and remaining time.

    Tokens are counted if ``include_num_input_tokens_seen`` is on.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._loss: float | None = None
        self._start = 0.0
        self._first_step = self._first_tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start, self._first_step, self._first_tokens = (
            time.perf_counter(),
            state.global_step,
            state.num_input_tokens_seen,
        )
        if not state.is_world_process_zero or args.disable_tqdm or not self.console.is_terminal:
            return
        self._bar = progress_bar(self.console)
        self._bar.start()
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, figures="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(
                self._task, completed=state.global_step, total=state.max_steps, figures=self._figures(state)
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        self._loss = logs.get("loss", self._loss)
        shown = {key: logs[key] for key in ("loss", "eval_loss", "eval_accuracy", "eval_f1") if key in logs}
        if self._bar is not None:
            self._bar.update(self._task, figures=self._figures(state))
        if not state.is_world_process_zero or self._bar is not None or not shown:
            return
        left = (
            (state.max_steps - state.global_step)
            * (time.perf_counter() - self._start)
            / max(1, state.global_step - self._first_step)
        )
        losses = " · ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in shown.items())
        self.console.print(
            f"step {state.global_step}/{state.max_steps} · {losses} · {self._speed(state)} · {left:.0f} s left",
            highlight=False,
        )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        if self._bar is not None and "eval_loss" in (metrics or {}):
            self._bar.console.print(f"step {state.global_step} · eval loss {metrics['eval_loss']:.4f}", highlight=False)

    def tokens(self, state: TrainerState) -> int:
        """Return the tokens seen since training started here; a resumed run does not count earlier ones."""
        return state.num_input_tokens_seen - self._first_tokens

    def close(self) -> None:
        """Remove the bar from the terminal, however training ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _figures(self, state: TrainerState) -> str:
        return " · ".join(([] if self._loss is None else [f"loss {self._loss:.4f}"]) + [self._speed(state)])

    def _speed(self, state: TrainerState) -> str:
        rate = self.tokens(state) / max(1e-9, time.perf_counter() - self._start)
        return f"{rate:,.0f} tokens/s · {memory() / 1e9:.2f} GB"


def show_summary(result: TrainingResult, console: Console) -> None:
    """Print a summary of a training run."""
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    table = Table(show_header=False, title="summary")
    table.add_column()
    table.add_column(overflow="fold")
    rows = {
        "steps": f"{result.steps:,} in {result.seconds:,.0f} s",
        "loss": f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "not logged",
        "eval loss": f"{evaluations[0]:.4f} -> {evaluations[-1]:.4f}" if evaluations else "",
        **{
            name.replace("_", " "): f"{found[0]:.4f} -> {found[-1]:.4f}"
            for name in ("eval_accuracy", "eval_f1")
            if (found := [entry[name] for entry in result.history if name in entry])
        },
        "tokens": f"{result.tokens:,}, {result.tokens / max(1e-9, result.seconds):,.0f} per second"
        if result.tokens
        else "",
        "data": escape(str(result.counts)),
        "trainable parameters": f"{result.trainable_parameters:,}",
        "peak memory": f"{peak_memory() / 1e9:.2f} GB",
        "saved in": str(result.directory),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    console.print(table)
