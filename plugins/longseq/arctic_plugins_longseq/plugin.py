"""The ``longseq`` plugin: training on sequences whose logits and activations would not fit in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from arctic_plugins import Plugin, hookimpl
from arctic_plugins.errors import ConfigError
from arctic_plugins_longseq.config import LongSeqConfig

__all__ = ["LongSeq"]


class LongSeq(Plugin):
    """Training on long texts; fills the slots ``loss`` and ``attention`` and leaves no trace in a checkpoint."""

    name = "longseq"
    config = LongSeqConfig
    slots = frozenset({"loss", "attention"})
    after = frozenset({"weight_codec", "placement", "adapter", "experts_dispatch"})

    options: LongSeqConfig

    @property
    def row_processes(self) -> int:
        return self.options.sequence_parallel

    @property
    def trainer_mixins(self) -> tuple[str, ...]:
        wanted = {
            "hf:TiledEvaluation": self.options.tiled_loss,
            "hf:OffloadedActivations": self.options.offload_activations,
            "training:SharedTexts": self.options.sequence_parallel > 1,
        }
        return tuple(f"arctic_plugins_longseq.{target}" for target, used in wanted.items() if used)

    @hookimpl
    def validate(self, hardware: str) -> Iterable[str]:
        self.check_processes("sequence_parallel")
        found = []
        for name, used in {"loss_tile": self.options.tiled_loss, "mlp_tile": self.options.tiled_mlp}.items():
            if getattr(self.options, name) and not used:
                found.append(f"{name} is set, but {name.replace('_tile', '')} is not tiled")
        if self.options.offload_activations and hardware == "cpu":
            found.append("offload_activations has no effect without a GPU: activations are in host memory anyway")
        return found

    @hookimpl
    def hf_training_arguments(self, args: Any) -> None:
        if self.options.recompute and args.gradient_checkpointing:
            raise ConfigError(
                f"plugins.longseq.recompute is {self.options.recompute:g} and training.gradient_checkpointing is on, "
                "which means recompute: 1",
                fix="leave one of them out",
            )

    @hookimpl
    def hf_transform_model(self, model: Any) -> Any:
        from arctic_plugins_longseq import hf

        if self.options.tiled_loss:
            hf.tile_loss(model, self.options.loss_tile)
        if self.options.tiled_mlp:
            hf.tile_mlps(model, self.options.mlp_tile)
        if self.options.recompute:
            hf.recompute(model, self.options.recompute)
        return model
