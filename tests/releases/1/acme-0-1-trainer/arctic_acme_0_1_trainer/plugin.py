"""The plugin ``acme-0-1-trainer``: a moving average of the loss in the Trainer's logs."""

from __future__ import annotations

from arctic_plugins import Plugin

from arctic_acme_0_1_trainer.config import Acme01TrainerConfig

__all__ = ["Acme01Trainer"]


class Acme01Trainer(Plugin):
    """A moving average of the loss, as ``loss_average`` in the Trainer's logs."""

    name = "acme-0-1-trainer"
    contracts = frozenset({1})
    config = Acme01TrainerConfig
    trainer_mixins = ("arctic_acme_0_1_trainer.training:AveragesLoss",)

    options: Acme01TrainerConfig
