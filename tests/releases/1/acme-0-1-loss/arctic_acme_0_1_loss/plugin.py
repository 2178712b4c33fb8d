"""The plugin ``acme-0-1-loss``: the usual loss, with the logits of a few tokens at a time in float32."""

from __future__ import annotations

from functools import partial
from typing import Any

from arctic_plugins import Plugin, hookimpl
from arctic_plugins.errors import ConfigError

from arctic_acme_0_1_loss.config import Acme01LossConfig

__all__ = ["Acme01Loss"]


class Acme01Loss(Plugin):
    """Cross-entropy of the next token, computed a few tokens at a time; fills the slot ``loss``."""

    name = "acme-0-1-loss"
    contracts = frozenset({1})
    config = Acme01LossConfig
    slots = frozenset({"loss"})
    before = frozenset({"adapter"})  # it sets an attribute of the model itself, not of an adapter around it

    options: Acme01LossConfig

    @hookimpl
    def hf_transform_model(self, model: Any) -> Any:
        from transformers.loss.loss_utils import ForCausalLMLoss

        from arctic_acme_0_1_loss.loss import tiled_cross_entropy

        if model.loss_function is not ForCausalLMLoss:
            raise ConfigError(
                f"plugins.{self.name}: {type(model).__name__} has its own loss function",
                expected="cross-entropy of the next token",
                fix=f"leave '{self.name}' out",
            )
        model.loss_function = partial(tiled_cross_entropy, tile=self.options.tile)
        return model
