"""The ``longseq`` plugin: training on sequences whose logits and activations would not fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from arctic_plugins import Plugin, hookimpl
from arctic_plugins_longseq.config import LongSeqConfig

__all__ = ["LongSeq"]


class LongSeq(Plugin):
    """Fills ``loss``. Nothing of it stays in a checkpoint."""

    name = "longseq"
    config = LongSeqConfig
    slots = frozenset({"loss"})
    after = frozenset({"weight_codec", "placement", "adapter", "experts_dispatch"})

    options: LongSeqConfig

    @hookimpl
    def validate(self) -> Iterable[str]:
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
