"""The trainers of TRL that a recipe can name in ``training.trainer``. Read in trl 1.16.0.

Importing this module loads neither torch nor TRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_plugins.errors import ConfigError, suggest

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

__all__ = ["TRAINERS", "TRLTrainer", "trl_trainer"]


@dataclass(frozen=True, eq=False)
class TRLTrainer:
    """A trainer of TRL."""

    name: str
    """Its name in a recipe."""
    classes: str
    """The names of its classes, without ``Trainer`` and ``Config``."""
    source: str
    """The file of its config, in TRL's directory."""
    module: str = "trl"
    paired: bool = True
    """Whether it compares two answers to a prompt, rather than judging each answer by itself."""
    tools: bool = True
    """Whether it shows the tools of a record to the chat template."""
    truncates: bool = True
    """Whether it truncates answers that are too long, rather than leaving the record out."""
    task: str | None = None
    """The task of the model that it trains, if that does not generate text; the model has a single output."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that a recipe need not set."""

    @property
    def preference(self) -> bool:
        """Whether it trains on the format ``preference``."""
        return self.name != "sft"

    def load(self) -> tuple[type[Trainer], type[TrainingArguments]]:
        """Import the trainer and its config."""
        module: Any = import_module(self.module)
        return getattr(module, f"{self.classes}Trainer"), getattr(module, f"{self.classes}Config")


_ORPO = {
    "remove_unused_columns": False,  # its collator reads them all
    "include_num_input_tokens_seen": "no",  # the Trainer counts input_ids, which its batches do not have
}
TRAINERS: Mapping[str, TRLTrainer] = {
    trainer.name: trainer
    for trainer in (
        TRLTrainer("sft", "SFT", "trainer/sft_config.py"),
        TRLTrainer("dpo", "DPO", "trainer/dpo_config.py"),
        TRLTrainer("kto", "KTO", "trainer/kto_config.py", paired=False),
        TRLTrainer(
            "orpo", "ORPO", "experimental/orpo/orpo_config.py", "trl.experimental.orpo", tools=False, defaults=_ORPO
        ),
        TRLTrainer("reward", "Reward", "trainer/reward_config.py", truncates=False, task="text-classification"),
    )
}


def trl_trainer(name: Any) -> TRLTrainer:
    """Return the trainer that a recipe calls ``name``.

    Raises:
        ConfigError: there is no such trainer, or the installed TRL lacks it.
    """
    trainer = TRAINERS.get(name) if isinstance(name, str) else None
    if trainer is None:
        raise ConfigError(
            f"training.trainer {name!r} is not a trainer of preference or supervised data that TRL has",
            expected=f"one of {', '.join(TRAINERS)}",
            fix=suggest(str(name), TRAINERS),
        )
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        raise ConfigError("TRL is not installed", fix="run 'pip install trl'")
    if not (Path(spec.origin).parent / trainer.source).is_file():
        raise ConfigError(
            f"the installed trl {version('trl')} has no trainer '{name}'",
            expected="trl 1.16",
            fix="install it, or choose another training.trainer",
        )
    return trainer
