"""Training with the ordinary Trainer: arguments that carry a stack, and ``attach``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from arctic_plugins.provenance import write_provenance
from arctic_plugins.stack import Stack, parse_plugins

__all__ = ["ArcticTrainingArguments", "attach"]

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


@dataclass
class ArcticTrainingArguments(TrainingArguments):
    """``TrainingArguments`` and the plugins to train with; works with ``HfArgumentParser`` on the command line and on YAML or JSON files."""

    # TrainingArguments reads fields listed here from JSON strings on the command line (transformers/training_args.py, 5.19.0).
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "plugins"]

    plugins: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Plugins and their options, as JSON on the command line: --plugins \'{"fp8": {}, "lora": {"r": 64}}\''}
    )

    def __post_init__(self) -> None:
        if isinstance(self.plugins, str):
            self.plugins = parse_plugins(self.plugins)
        super().__post_init__()
        Stack.from_dict(self.plugins).hf_training_arguments(self)


class _CommitCallback(TrainerCallback):
    """Writes ``arctic_plugins.json`` last into every checkpoint that the Trainer saves."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        directory = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and directory.is_dir():
            write_provenance(directory, self.stack)


def attach(trainer: AnyTrainer, stack: Stack) -> AnyTrainer:
    """Let the plugins of ``stack`` reach ``trainer`` (any ``Trainer``, TRL's included) and mark its checkpoints with the stack.

    Call it once, after building the trainer around a model from :func:`~arctic_plugins_huggingface.load_model` and before ``train()``.
    """
    trainer.add_callback(_CommitCallback(stack))
    stack.hf_attach_trainer(trainer)
    return trainer
