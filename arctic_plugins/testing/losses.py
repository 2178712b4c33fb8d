"""The laws of plugins that compute the loss in their own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from arctic_plugins.stack import Stack
from arctic_plugins.testing.suite import Suite

__all__ = ["LossSuite"]

Model = tuple[str, Mapping[str, Any]]


class LossSuite(Suite):
    """The laws of plugins that fill the slot ``loss`` with the cross entropy of all tokens, computed differently.

    Subclass it::

        class TestMyLoss(LossSuite):
            plugin = "my-plugin"
            options = [{}, {"tile": 7}]
    """

    over = {"options": "options", "model": "models"}

    plugin: ClassVar[str]
    """The name of its entry point in the group ``arctic_plugins``."""
    options: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Options to try, as in a recipe."""
    models: ClassVar[Sequence[Model]] = (("llama", {}), ("llama", {"tie_word_embeddings": True}))
    """Types and configs of the models, for :func:`~arctic_plugins.testing.tiny_model`."""

    def test_loss_and_gradients_are_those_of_all_logits(
        self, options: Mapping[str, Any], model: Model, tiny_models: Callable[..., Path]
    ) -> None:
        import torch

        plain, changed = self._pair(options, model, tiny_models)
        for more in ({}, {"num_items_in_batch": torch.tensor(123)}):
            (expected, wanted), (loss, found) = (_gradients(each, more) for each in (plain, changed))
            assert torch.allclose(loss, expected, rtol=1e-5, atol=1e-6), (
                f"the loss is {loss.item():.7g}; expected {expected.item():.7g}, that of all logits{_given(more)}"
            )
            assert found.keys() == wanted.keys(), (
                f"other parameters get gradients: {sorted(found.keys() ^ wanted.keys())}"
            )
            for name, gradient in wanted.items():
                assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), (
                    f"the gradient of {name} is not that of all logits{_given(more)}"
                )

    def test_logits_are_there_without_labels_and_in_evaluation(
        self, options: Mapping[str, Any], model: Model, tiny_models: Callable[..., Path]
    ) -> None:
        import torch

        plain, changed = self._pair(options, model, tiny_models)
        inputs = _batch()
        with torch.no_grad():
            for training, keys in ((True, ("input_ids", "attention_mask")), (False, tuple(inputs))):
                given = {key: inputs[key] for key in keys}
                expected, found = (each.train(training)(**given).logits for each in (plain, changed))
                when = "in evaluation" if not training else "without labels"
                assert found is not None, f"there are no logits {when}"
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), f"logits differ {when}"

    def _pair(self, options: Mapping[str, Any], model: Model, tiny_models: Callable[..., Path]) -> tuple[Any, Any]:
        hosts = pytest.importorskip("arctic_plugins_huggingface", reason="its integration is not installed")
        hosts.register()
        checkpoint = tiny_models(model[0], **model[1])
        plain, _ = hosts.load_model(checkpoint)
        changed, _ = hosts.load_model(checkpoint, Stack.from_dict({self.plugin: options}))
        return plain.train(), changed.train()


def _batch() -> dict[str, Any]:
    """Return two rows, one of them padded, some of whose tokens have no labels."""
    import torch

    ids = torch.randint(5, 272, (2, 40), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :9], labels[0, 20:23] = -100, -100
    ids[1, 30:], labels[1, 30:], mask[1, 30:] = 0, -100, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _gradients(model: Any, more: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    model.zero_grad()
    loss = model(**_batch(), use_cache=False, **more).loss
    loss.backward()
    return loss.detach(), {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def _given(more: Mapping[str, Any]) -> str:
    return f" with {', '.join(more)}" if more else ""
