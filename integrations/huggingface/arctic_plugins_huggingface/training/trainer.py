"""Training with the ordinary Trainer: arguments that carry a stack, ``attach``, and checkpoints that survive. Read in
transformers 5.19.0.
"""

from __future__ import annotations

import logging
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from torch.distributed import distributed_c10d
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from arctic_plugins.compute import warning_for
from arctic_plugins.errors import CheckpointError
from arctic_plugins.provenance import check_files, write_provenance
from arctic_plugins.stack import Stack, parse_plugins
from arctic_plugins_huggingface.checkpoints.gather import is_spread
from arctic_plugins_huggingface.files.check import by_step, complete_checkpoints
from arctic_plugins_huggingface.loading.names import split_conversions
from arctic_plugins_huggingface.loading.restore import restore_weights
from arctic_plugins_huggingface.training.engines import engine_mixins
from arctic_plugins_huggingface.training.experts_ddp import experts_mixin
from arctic_plugins_huggingface.training.finite import FiniteGuard, FiniteSteps, anywhere
from arctic_plugins_huggingface.training.mixins import compose, plugin_mixins

__all__ = ["ArcticTrainingArguments", "GracefulStop", "attach", "last_checkpoint"]

logger = logging.getLogger(__name__)

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


@dataclass
class ArcticTrainingArguments(TrainingArguments):
    """``TrainingArguments`` and the plugins to train with; works with ``HfArgumentParser`` on the command line and on
    YAML or JSON files.
    """

    # TrainingArguments reads fields listed here from JSON strings on the command line (transformers/training_args.py,
    # 5.19.0).
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "plugins"]

    plugins: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Plugins and their options, as JSON on the command line: --plugins \'{"fp8": {}, "lora": {"r": '
            "64}}'"
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.plugins, str):
            self.plugins = parse_plugins(self.plugins)
        super().__post_init__()
        Stack.from_dict(self.plugins).hf_training_arguments(self)


class _CommitCallback(TrainerCallback):
    """Writes ``arctic_plugins.json`` last into every checkpoint that the Trainer saves, and only then removes older
    ones.
    """

    def __init__(self, stack: Stack, limit: int | None) -> None:
        self.stack, self.limit = stack, limit

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        output = Path(args.output_dir or ".")
        directory = output / f"checkpoint-{state.global_step}"
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process writes its own random state
        if state.is_world_process_zero and directory.is_dir():
            write_provenance(directory, self.stack.to_dict())
            self._remove_older(output, {directory, Path(state.best_model_checkpoint or directory)})

    def _remove_older(self, output: Path, keep: set[Path]) -> None:
        """As the Trainer's ``rotate_checkpoints``, but an incomplete checkpoint of a higher step neither counts nor is
        taken for the newest.
        """
        complete = complete_checkpoints(output)
        for path in complete[: max(0, len(complete) - self.limit)] if self.limit else []:
            if path not in keep:
                shutil.rmtree(path, ignore_errors=True)


def attach(trainer: AnyTrainer, stack: Stack, *, skip_nonfinite: bool = False) -> AnyTrainer:
    """Let the plugins of ``stack`` reach ``trainer`` (any ``Trainer``, TRL's included) and mark its checkpoints with
    the stack.

    Call it once, after building the trainer around a model from :func:`~arctic_plugins_huggingface.load_model` and
    before ``train()``. It takes ``save_total_limit`` over: the Trainer would remove the last complete checkpoint before
    the new one is marked as complete.

    Args:
        trainer: changed, and returned. Its class becomes a subclass of the one it has, composed of what the host and
            the plugins contribute; ``repr(trainer)`` names them.
        stack: what the model was loaded with.
        skip_nonfinite: leave a step whose loss or gradient is NaN or infinite out, instead of raising
            :class:`~arctic_plugins.errors.Diverged`; eleven in a row raise it still.

    Raises:
        ConfigError: the trainer was attached to a stack already, or what a plugin finds wrong with it.
        PluginNotFoundError: DeepSpeed makes its steps, its model has frozen or spread modules, and
            ``arctic-plugins-deepspeed`` is not installed.
    """
    if trainer.args.bf16 and (
        line := warning_for(torch.bfloat16, "training", "pass bf16=False", trainer.args.device.type)
    ):
        logger.warning(line)  # TRL's SFTConfig turns it on by itself
    if trainer.args.use_cpu:
        _set_timeouts(trainer.args.ddp_timeout_delta)
    compose(trainer, [*_host_mixins(trainer), *plugin_mixins(stack)])
    guard = FiniteGuard(trainer, skip=skip_nonfinite)
    assert isinstance(trainer, FiniteSteps)  # since compose
    trainer.finite_guard = guard
    trainer.add_callback(guard)
    trainer.add_callback(_CommitCallback(stack, trainer.args.save_total_limit))  # last of the host's
    trainer.args.save_total_limit = None
    stack.hf_attach_trainer(trainer)
    return trainer


def _host_mixins(trainer: Trainer) -> list[tuple[type, None]]:
    """What the host itself adds, the innermost first."""
    found: list[type] = []
    assert trainer.model is not None  # Trainer.__init__ sees to it
    if trainer.is_deepspeed_enabled:
        found += engine_mixins(trainer, "deepspeed")
    elif is_spread(trainer.model):
        found.append(experts_mixin(trainer))
    elif (
        not trainer.is_fsdp_enabled  # which has files of its own
        and not isinstance(trainer.model, PeftModel)
        and split_conversions(trainer.model)[1]
    ):
        found.append(RestoresConverted)
    return [(mixin, None) for mixin in (*found, FiniteSteps)]


def _set_timeouts(timeout: timedelta) -> None:
    """With ``use_cpu``, transformers (``training_args.py``) leaves ``ddp_timeout`` out: give it to the groups that have
    torch's default (2.13).
    """
    for group in list(distributed_c10d._world.pg_map):
        if group._get_backend(torch.device("cpu")).options._timeout == distributed_c10d.default_pg_timeout:
            distributed_c10d._set_pg_timeout(timeout, group)


class RestoresConverted(Trainer):
    """Mixin: resuming, and the best model at the end, where checkpoints hold weights under other names than the model,
    or cut otherwise.
    """

    model: nn.Module

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_weights(model or self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        restore_weights(self.model, str(self.state.best_model_checkpoint))


def last_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, for ``trainer.train(resume_from_checkpoint=...)``, and why newer ones
    are passed over.

    A save that was cut off has no ``arctic_plugins.json``; one that was damaged since does not agree with it.
    """
    ignored: list[str] = []
    for _, path in reversed(by_step(Path(output_dir))):
        try:
            check_files(path)
        except CheckpointError as error:
            ignored.append(f"{path} is not complete: {error.found}")
        else:
            return path, ignored
    return None, ignored


class GracefulStop(TrainerCallback):
    """Stops training after the step in progress, with a checkpoint, when the process is interrupted or terminated; a
    second signal stops at once.

    Pass it to the Trainer and train within :meth:`listening`.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM over for the time of the block (in the main thread; elsewhere Python delivers no
        signals).
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        [stop] = anywhere(
            args.device, self.requested
        )  # the signal reaches processes at different steps, and all must save the same one
        if stop:
            self.requested = (
                True  # never back to False: a signal may have come since the flag was made, and counts in the next step
            )
            control.should_save = control.should_training_stop = True
