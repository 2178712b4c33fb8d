"""The laws of model architectures that plugins add to the hosts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from arctic_plugins.discovery import process_registry
from arctic_plugins.registry import load
from arctic_plugins.testing.suite import Suite

__all__ = ["ModelSuite"]

TinyModels = Callable[..., Path]


class ModelSuite(Suite):
    """The laws of architectures registered with :meth:`arctic_plugins.Registry.model`, in transformers.

    Subclass it::

        class TestMyModel(ModelSuite):
            model_type = "my-model"
            config = {"num_layers": 2}
    """

    model_type: ClassVar[str]
    """The ``model_type`` in ``config.json``."""
    config: ClassVar[Mapping[str, Any]] = {}
    """What differs from the small sizes of :func:`~arctic_plugins.testing.tiny_model`."""

    def test_classes_are_those_of_the_type(self) -> None:
        import transformers

        _hosts()
        classes = process_registry().models.get(self.model_type)
        assert classes is not None, f"no installed plugin registers the model type '{self.model_type}'"
        config = load(classes.config)
        assert issubclass(config, transformers.PreTrainedConfig), f"{classes.config} is not a PreTrainedConfig"
        assert config.model_type == self.model_type, f"{classes.config} has the model_type '{config.model_type}'"
        for target in (classes.base, classes.causal_lm):
            assert issubclass(load(target), transformers.PreTrainedModel), f"{target} is not a PreTrainedModel"
            assert load(target).config_class is config, f"{target} has another config_class than {classes.config}"
        module = classes.vllm.partition(":")[0]
        assert importlib.util.find_spec(module) is not None, f"{classes.vllm}, for vLLM, does not exist"

    def test_config_goes_to_a_checkpoint_and_back(self, tmp_path: Path) -> None:
        _hosts()
        from transformers import AutoConfig

        config = AutoConfig.for_model(self.model_type, **self.config)
        config.save_pretrained(tmp_path)
        again = type(config).from_pretrained(tmp_path)
        for name, value in vars(config).items():
            if not name.startswith("_") and name != "transformers_version":
                found = getattr(again, name, None)
                assert found == value, f"config.json does not keep {name}, which is {value!r}: it is read as {found!r}"

    def test_a_saved_checkpoint_computes_the_same(self, tiny_models: TinyModels, tmp_path: Path) -> None:
        import torch

        model = self._model(tiny_models)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        expected, found = model.state_dict(), again.state_dict()
        assert found.keys() == expected.keys(), f"saving loses or adds {sorted(found.keys() ^ expected.keys())}"
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name} is not bitwise the same after saving and loading"
        assert torch.equal(_logits(again, _ids()), _logits(model, _ids())), (
            "a model that was saved returns other logits"
        )

    def test_tokens_do_not_see_later_ones(self, tiny_models: TinyModels) -> None:
        import torch

        model, ids = self._model(tiny_models), _ids()
        expected = _logits(model, ids)[:, :12]
        ids[:, 12:] = 7
        assert torch.allclose(_logits(model, ids)[:, :12], expected, atol=1e-4), "logits depend on later tokens"

    def test_a_cache_changes_nothing(self, tiny_models: TinyModels) -> None:
        import torch

        model, ids = self._model(tiny_models).eval(), _ids()
        with torch.no_grad():
            steps = [model(ids[:, :12], use_cache=True)]
            for at in range(12, ids.shape[1]):
                past = steps[-1].past_key_values
                steps.append(model(ids[:, at : at + 1], past_key_values=past, use_cache=True))
        found = torch.cat([step.logits for step in steps], 1)
        assert torch.allclose(found, _logits(model, ids), atol=1e-4, rtol=1e-4), "logits differ with a cache"

    def test_gradients_reach_every_parameter(self, tiny_models: TinyModels) -> None:
        model = self._model(tiny_models).train()
        model(_ids(), labels=_ids()).loss.backward()
        missing = sorted(name for name, each in model.named_parameters() if each.requires_grad and each.grad is None)
        assert not missing, f"no gradient reaches {missing}"

    def test_recomputation_changes_no_gradient(self, tiny_models: TinyModels) -> None:
        import torch

        found = []
        for recomputed in (False, True):
            model = self._model(tiny_models).train()
            if recomputed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model(_ids(), labels=_ids(), use_cache=False).loss.backward()
            found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
        for name, gradient in found[0].items():
            assert torch.allclose(found[1][name], gradient, atol=1e-5, rtol=1e-4), (
                f"the gradient of {name} differs with gradient checkpointing"
            )

    def _model(self, tiny_models: TinyModels) -> Any:
        hosts = _hosts()  # registers the type
        model, _ = hosts.load_model(tiny_models(self.model_type, **self.config))
        return model


def _hosts() -> Any:
    hosts = pytest.importorskip("arctic_plugins_huggingface", reason="arctic-plugins-huggingface is not installed")
    hosts.register()
    return hosts


def _ids() -> Any:
    import torch

    return torch.randint(5, 200, (2, 20), generator=torch.Generator().manual_seed(0))


def _logits(model: Any, ids: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(ids).logits
