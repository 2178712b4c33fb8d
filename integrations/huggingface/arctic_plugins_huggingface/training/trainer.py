"""Training with the ordinary Trainer: arguments with a stack, ``attach``, and checkpoints that survive interruptions.

Read in transformers 5.19.0.
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
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.provenance import check_files, write_provenance
from arctic_plugins.stack import Stack, parse_plugins
from arctic_plugins_huggingface.checkpoints.gather import is_spread
from arctic_plugins_huggingface.files.check import by_step, complete_checkpoints
from arctic_plugins_huggingface.loading.names import split_conversions
from arctic_plugins_huggingface.loading.restore import restore_weights
from arctic_plugins_huggingface.loading.tasks import labels_of
from arctic_plugins_huggingface.training.engines import engine_mixins
from arctic_plugins_huggingface.training.experts_ddp import experts_mixin
from arctic_plugins_huggingface.training.finite import FiniteGuard, FiniteSteps, anywhere
from arctic_plugins_huggingface.training.liger import settle_liger
from arctic_plugins_huggingface.training.mixins import compose, plugin_mixins

__all__ = ["ArcticTrainingArguments", "GracefulStop", "attach", "last_checkpoint"]

logger = logging.getLogger(__name__)

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


@dataclass
class ArcticTrainingArguments(TrainingArguments):
    """``TrainingArguments`` plus the plugins to train with.

    Works with ``HfArgumentParser``, on the command line and with YAML or JSON files.
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
    """Plugin name -> options; a string is JSON."""

    def __post_init__(self) -> None:
        if isinstance(self.plugins, str):
            self.plugins = parse_plugins(self.plugins)
        super().__post_init__()
        Stack.from_dict(self.plugins).hf_training_arguments(self)


class _CommitCallback(TrainerCallback):
    """Callback that writes ``arctic_plugins.json`` last into every checkpoint, and only then removes older ones."""

    def __init__(self, stack: Stack, limit: int | None) -> None:
        self.stack, self.limit = stack, limit

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        output = Path(args.output_dir or ".")
        directory = output / f"checkpoint-{state.global_step}"
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process writes its own random state first
        if state.is_world_process_zero and directory.is_dir():
            write_provenance(directory, self.stack.to_dict(), config=labels_of(kwargs["model"]))
            self._remove_older(output, {directory, Path(state.best_model_checkpoint or directory)})

    def _remove_older(self, output: Path, keep: set[Path]) -> None:
        """Remove older checkpoints as the Trainer's ``rotate_checkpoints`` does, but ignore incomplete ones.

        An incomplete checkpoint of a higher step neither counts nor passes for the newest.
        """
        complete = complete_checkpoints(output)
        for path in complete[: max(0, len(complete) - self.limit)] if self.limit else []:
            if path not in keep:
                shutil.rmtree(path, ignore_errors=True)


def attach(trainer: AnyTrainer, stack: Stack, *, skip_nonfinite: bool = False) -> AnyTrainer:
    """Apply the plugins of ``stack`` to ``trainer`` (any ``Trainer``, including TRL's) and record them in checkpoints.

    Call it once, after building the trainer around a model from :func:`~arctic_plugins_huggingface.load_model` and
    before ``train()``. It takes over ``save_total_limit``: the Trainer would remove the last complete checkpoint before
    the new one is marked as complete.

    Args:
        trainer: changed in place, and returned. Its class becomes a subclass of its present class, composed of mixins
            from the host and the plugins; ``repr(trainer)`` lists them.
        stack: the stack that the model was loaded with.
        skip_nonfinite: skip a step whose loss or gradient is NaN or infinite, instead of raising
            :class:`~arctic_plugins.errors.Diverged`; eleven in a row still raise it.

    Raises:
        ConfigError: if the trainer is already attached to a stack, or a plugin finds something wrong with it; or if
            Liger's kernels are asked for and cannot be used (:mod:`arctic_plugins_huggingface.training.liger`).
        PluginNotFoundError: if DeepSpeed runs its steps, its model has frozen or spread modules, and
            ``arctic-plugins-deepspeed`` is not installed.
    """
    if trainer.args.bf16 and (
        line := warning_for(torch.bfloat16, "training", "pass bf16=False", trainer.args.device.type)
    ):
        logger.warning(line)  # TRL's SFTConfig turns it on by itself
    if "disk" in (getattr(trainer.model, "hf_device_map", None) or {}).values():
        raise ConfigError(
            "device_map puts modules of the model on 'disk', which accelerate supports for inference only",
            expected="a model without such a device_map",
            fix="use the plugin 'offload', which also trains",
        )
    if trainer.args.use_cpu:
        _set_timeouts(trainer.args.ddp_timeout_delta)
    settle_liger(trainer)
    compose(trainer, [*_host_mixins(trainer), *plugin_mixins(stack)])
    guard = FiniteGuard(trainer, skip=skip_nonfinite)
    assert isinstance(trainer, FiniteSteps)  # because of compose
    trainer.finite_guard = guard
    trainer.add_callback(guard)
    trainer.add_callback(_CommitCallback(stack, trainer.args.save_total_limit))  # last of the host's
    trainer.args.save_total_limit = None
    stack.hf_attach_trainer(trainer)
    return trainer


def _host_mixins(trainer: Trainer) -> list[tuple[type, None]]:
    """Return the mixins that the host itself adds, the innermost first."""
    found: list[type] = []
    assert trainer.model is not None  # ensured by Trainer.__init__
    if trainer.is_deepspeed_enabled:
        found += engine_mixins(trainer, "deepspeed")
    elif is_spread(trainer.model):
        found.append(experts_mixin(trainer))
    elif (
        not trainer.is_fsdp_enabled  # FSDP has its own files
        and not isinstance(trainer.model, PeftModel)
        and split_conversions(trainer.model)[1]
    ):
        found.append(RestoresConverted)
    return [(mixin, None) for mixin in (*found, FiniteSteps)]


def _set_timeouts(timeout: timedelta) -> None:
    """Set the timeout of the process groups that have torch's default (2.13).

    With ``use_cpu``, transformers (``training_args.py``) ignores ``ddp_timeout``.
    """
    for group in list(distributed_c10d._world.pg_map):
        if group._get_backend(torch.device("cpu")).options._timeout == distributed_c10d.default_pg_timeout:
            distributed_c10d._set_pg_timeout(timeout, group)


class RestoresConverted(Trainer):
    """Mixin for models whose checkpoints name or split weights differently.

    It covers resuming, and loading the best model at the end.
    """

    model: nn.Module

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_weights(model or self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        restore_weights(self.model, str(self.state.best_model_checkpoint))


def last_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint of a run, and the reasons why newer ones were skipped.

    Pass the checkpoint to ``trainer.train(resume_from_checkpoint=...)``. One whose save was interrupted has no
    ``arctic_plugins.json``; one that was damaged later does not match it.
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
    """Callback that stops training after the current step, with a checkpoint, when SIGINT or SIGTERM arrives.

    A second signal stops training at once. Pass the callback to the Trainer and train within :meth:`listening`.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM within the block, in the main thread only: Python delivers no signals to others."""
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
        )  # a signal reaches the processes at different steps, and all of them must save the same one
        if stop:
            self.requested = (
                True  # never reset: a signal that arrived after the flag was read takes effect at the next step
            )
            control.should_save = control.should_training_stop = True
