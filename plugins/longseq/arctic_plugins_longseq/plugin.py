"""The ``longseq`` plugin: training on sequences whose logits and activations would not fit."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from arctic_plugins import Plugin, hookimpl
from arctic_plugins.errors import ConfigError
from arctic_plugins_longseq.config import LongSeqConfig

__all__ = ["LongSeq"]


class LongSeq(Plugin):
    """Fills ``loss`` and ``attention``. Nothing of it stays in a checkpoint."""

    name = "longseq"
    config = LongSeqConfig
    slots = frozenset({"loss", "attention"})
    after = frozenset({"weight_codec", "placement", "adapter", "experts_dispatch"})

    options: LongSeqConfig

    @hookimpl
    def validate(self) -> Iterable[str]:
        size, shared = int(os.environ.get("WORLD_SIZE", "1")), self.options.sequence_parallel
        if size % shared:
            raise ConfigError(
                f"plugins.longseq.sequence_parallel is {shared} with {size} process{'es' if size > 1 else ''}",
                expected="a divisor of the number of processes",
                fix=f"'arctic train RECIPE --nproc {shared}', torchrun or accelerate launch start several; or correct it",
            )
        on = {"loss_tile": self.options.tiled_loss, "mlp_tile": self.options.tiled_mlp}
        return [
            f"{name} is set, and {name.replace('_tile', '')} is not tiled" for name, used in on.items() if getattr(self.options, name) and not used
        ]

    @hookimpl
    def hf_transform_model(self, model: Any) -> Any:
        from arctic_plugins_longseq import hf

        if self.options.tiled_loss:
            hf.tile_loss(model, self.options.loss_tile)
        if self.options.tiled_mlp:
            hf.tile_mlps(model, self.options.mlp_tile)
        return model

    @hookimpl
    def hf_attach_trainer(self, trainer: Any) -> None:
        from arctic_plugins_longseq import hf

        if self.options.tiled_loss:
            hf.tile_evaluation(trainer)
        if self.options.sequence_parallel > 1:
            from arctic_plugins_longseq.training import parallelize

            parallelize(trainer, self.options.sequence_parallel)
