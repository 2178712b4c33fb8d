"""DeepSpeed as a Trainer engine of the Hugging Face host. Read in deepspeed 0.19.8."""

from __future__ import annotations

from pathlib import Path

from arctic_plugins_huggingface.training import TrainerEngine
from transformers import Trainer

__all__ = ["ZeRO"]


class ZeRO(TrainerEngine):
    """The engine selected by ``training.deepspeed``."""

    title = "DeepSpeed"
    state_file = "latest"
    """The file that names the directory in which the engine stores the optimizer state."""

    def mixins(self, trainer: Trainer) -> list[type[Trainer]]:
        from arctic_plugins_deepspeed.zero import mixins

        return mixins(trainer)

    def processes(self, checkpoint: Path) -> int | None:
        """Count the files of ZeRO, one per process (``DeepSpeedEngine._get_zero_ckpt_name``)."""
        return len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))) or None
