"""The plugin ``acme``: a moving average of the loss in the Trainer's logs."""

from __future__ import annotations

from arctic_plugins import Plugin

from arctic_acme.config import AcmeConfig

__all__ = ["Acme"]


class Acme(Plugin):
    """A moving average of the loss, as ``loss_average`` in the Trainer's logs."""

    name = "acme"
    contracts = frozenset({1})
    config = AcmeConfig
    trainer_mixins = ("arctic_acme.training:AveragesLoss",)

    options: AcmeConfig
