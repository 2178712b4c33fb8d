"""The mixin: what it overrides of ``transformers.Trainer``. Read in transformers 5.19.0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

if TYPE_CHECKING:
    from arctic_acme_0_1_trainer.plugin import Acme01Trainer

__all__ = ["AveragesLoss"]


class AveragesLoss(Trainer):
    """Mixin that adds an exponential moving average of the loss to the logs.

    It has no ``__init__``, because it is added to a trainer that exists already.
    """

    loss_decay: float
    loss_average: float | None

    def on_attach(self, plugin: Acme01Trainer) -> None:
        """Prepare the trainer. Called once, with the plugin and its options."""
        self.loss_decay, self.loss_average = plugin.options.decay, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            before = logs["loss"] if self.loss_average is None else self.loss_average
            self.loss_average = self.loss_decay * before + (1 - self.loss_decay) * logs["loss"]
            logs = {**logs, "loss_average": self.loss_average}
        super().log(logs, *args, **kwargs)
