"""The laws of plugins, whatever they fill: their options, what they register, and what they do to a small model."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from arctic_plugins.discovery import installed_plugins, load_plugin, new_plugin_manager
from arctic_plugins.errors import ClaimError, ConfigError, ResolveError
from arctic_plugins.registry import FIRST_PARTY, Registry
from arctic_plugins.stack import Stack
from arctic_plugins.testing.processes import QUIET_RUN, run_python
from arctic_plugins.testing.suite import Suite

__all__ = ["PluginSuite"]

TinyModels = Callable[..., Path]

_IMPORTS = """
import sys
from arctic_plugins import Registry
from arctic_plugins.discovery import load_plugin, new_plugin_manager
from arctic_plugins.host import hosts
manager = new_plugin_manager(only=("register",))
manager.register(load_plugin(sys.argv[1]))
manager.hook.register(registry=Registry())
print(*sorted({"torch", *hosts()} & sys.modules.keys()))
"""


class PluginSuite(Suite):
    """The laws of an installed :class:`arctic_plugins.Plugin`::

        class TestMyPlugin(PluginSuite):
            plugin = "my-plugin"
            options = [{}, {"bits": 3}]

    What it does to a model is tried with ``arctic-plugins-huggingface``, on a tiny model that is trained for one step.
    """

    over = {"options": "options", "other": "others"}

    plugin: ClassVar[str]
    """The name of its entry point in the group ``arctic_plugins``."""
    options: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Options to try, as in a recipe; the first ones also together with each other plugin."""
    model: ClassVar[tuple[str, Mapping[str, Any]]] = ("llama", {})
    """The type and config of the model, for :func:`~arctic_plugins.testing.tiny_model`."""

    @property
    def others(self) -> list[str]:
        """The installed plugins of this project, with which it must compose."""
        return sorted((FIRST_PARTY & installed_plugins().keys()) - {self.plugin})

    # Without a host.

    def test_importing_it_loads_neither_torch_nor_a_host(self) -> None:
        found = run_python("-c", _IMPORTS, self.plugin).stdout.split()
        assert not found, f"importing and registering '{self.plugin}' imports {found}; import them inside functions"

    def test_registering_twice_changes_nothing(self) -> None:
        once, twice = _registered(self.plugin, 1), _registered(self.plugin, 2)
        assert once == twice, f"'{self.plugin}' registers something else the second time"

    def test_what_it_registers_exists(self) -> None:
        for target in _targets(_registered(self.plugin, 1)):
            module, _, name = target.partition(":")
            assert _defines(module, name), f"'{self.plugin}' registers {target}, which does not exist"

    def test_options_go_to_a_checkpoint_and_back(self, options: Mapping[str, Any]) -> None:
        plugin = load_plugin(self.plugin).from_options(options)
        stored = json.loads(json.dumps(plugin.options.model_dump(mode="json")))
        again = load_plugin(self.plugin).from_options(stored)
        assert again.options == plugin.options, f"arctic_plugins.json holds {stored}, which is read as {again.options}"

    def test_options_are_immutable_and_closed(self, options: Mapping[str, Any]) -> None:
        kind = load_plugin(self.plugin)
        with pytest.raises(ConfigError):
            kind.from_options({**options, "no_such_option": 1})
        plugin = kind.from_options(options)
        for name in kind.config.model_fields:
            with pytest.raises(ValidationError):
                setattr(plugin.options, name, None)

    def test_options_have_a_schema_with_descriptions(self) -> None:
        schema = load_plugin(self.plugin).config.model_json_schema()
        json.dumps(schema)
        for kind in (schema, *schema.get("$defs", {}).values()):
            for name, option in kind.get("properties", {}).items():
                assert option.get("description"), f"option '{name}' has no text below it that describes it"
        for example in schema.get("examples", ()):
            load_plugin(self.plugin).from_options(example)

    # With one.

    def test_what_is_claimed_is_what_changes(self, options: Mapping[str, Any], tiny_models: TinyModels) -> None:
        import torch

        hosts, stack = _hugging_face(), Stack.from_dict({self.plugin: options})
        checkpoint = tiny_models(self.model[0], **self.model[1])
        plan = hosts.plan_model(checkpoint, stack)
        model, _ = hosts.load_model(checkpoint, stack)
        codecs, placed = plan.weights.codecs, plan.weights.placements
        found = {}
        for name, weight in _frozen(model).items():
            found[name] = weight.codec
            assert (weight.handle is not None) == (name in placed), f"{name} is not where the claims place it"
        assert found == codecs, f"other weights are encoded than were claimed: {found.keys() ^ codecs.keys()}"
        plain, _ = hosts.load_model(checkpoint)
        tensors = {_plain_name(name): tensor for name, tensor in model.state_dict().items()}
        for name, tensor in plain.state_dict().items():
            if name.removesuffix(".weight") in codecs:
                continue
            assert name in tensors, f"{name} is missing, although nothing claims it"
            assert torch.equal(tensors[name], tensor), f"{name} changes, although nothing claims it"

    def test_a_saved_checkpoint_computes_the_same(
        self, options: Mapping[str, Any], tiny_models: TinyModels, tmp_path: Path
    ) -> None:
        import torch
        from arctic_plugins_huggingface.checkpoints import load_checkpoint

        from arctic_plugins.testing.models import draw_adapter

        hosts, stack = _hugging_face(), Stack.from_dict({self.plugin: options})
        model, tokenizer = hosts.load_model(tiny_models(self.model[0], **self.model[1]), stack)
        draw_adapter(model)
        hosts.save_checkpoint(model, tokenizer, tmp_path / "saved", stack)
        again, _ = load_checkpoint(tmp_path / "saved")
        expected, found = _tensors(model), _tensors(again)
        assert found.keys() == expected.keys(), f"saving loses or adds {sorted(found.keys() ^ expected.keys())}"
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name} is not bitwise the same after saving and loading"
        # Not bitwise: what only training needs is not loaded again, and may compute in another order.
        difference = (_logits(again) - _logits(model)).abs().max().item()
        assert difference < 1e-3, f"after saving and loading, logits differ by {difference:.2g}"

    def test_a_training_step_changes_only_what_is_trained(
        self, options: Mapping[str, Any], tiny_models: TinyModels, tmp_path: Path
    ) -> None:
        import torch

        trainer = self._trainer(options, tiny_models, tmp_path)
        before = _tensors(trainer.model)
        result = trainer.train()
        assert math.isfinite(result.training_loss), f"the loss of a training step is {result.training_loss}"
        changed = {name for name, tensor in _tensors(trainer.model).items() if not torch.equal(tensor, before[name])}
        trained = {_plain_name(name) for name, each in trainer.model.named_parameters() if each.requires_grad}
        assert changed <= trained, f"a training step changes {sorted(changed - trained)}, which require no gradient"
        assert changed, "a training step changes nothing"

    def test_what_it_adds_to_a_trainer_calls_the_trainer(
        self, options: Mapping[str, Any], tiny_models: TinyModels, tmp_path: Path
    ) -> None:
        from transformers import Trainer

        from arctic_plugins.registry import load

        stack = Stack.from_dict({self.plugin: options})
        mixins = [load(target) for target, _ in stack.trainer_mixins()]
        if not mixins:
            pytest.skip(f"'{self.plugin}' adds no mixins with these options")
        for mixin in mixins:
            assert "__init__" not in vars(mixin), f"{mixin.__name__} has an __init__, which is never called"
        overridden = {name for mixin in mixins for name in vars(mixin) if callable(getattr(Trainer, name, None))}
        called: list[str] = []

        def noted(name: str) -> Callable[..., Any]:
            def method(self: Any, *args: Any, **kwargs: Any) -> Any:
                called.append(name)
                return getattr(Trainer, name)(self, *args, **kwargs)

            return method

        kind = type("Noted", (Trainer,), {name: noted(name) for name in overridden})
        trainer = self._trainer(options, tiny_models, tmp_path, kind=kind)
        trainer.train()
        trainer.evaluate()
        missing = sorted(overridden - set(called))
        assert not missing, f"{', '.join(missing)} of its mixins do not call super() in training or evaluation"

    def test_it_composes_with(self, other: str, tiny_models: TinyModels) -> None:
        pair = {self.plugin: self.options[0], other: _example(other)}
        checkpoint = tiny_models(self.model[0], **self.model[1])
        try:
            stack = Stack.from_dict(pair)
            assert Stack.from_dict(dict(reversed(pair.items()))).sha256() == stack.sha256(), "the order matters"
            model, _ = _hugging_face().load_model(checkpoint, stack)
        except (ResolveError, ClaimError) as error:
            if not (self.plugin in str(error) and other in str(error)):
                raise AssertionError(f"the error does not name '{self.plugin}' and '{other}': {error}") from error
            return
        model.train()
        loss = model(input_ids=_ids(), labels=_ids()).loss
        assert loss.isfinite(), f"with '{other}', the loss is {loss.item()}"
        loss.backward()

    def test_it_is_registered_in_a_worker(self, workers: Mapping[str, Any]) -> None:
        assert self.plugin in workers["plugins"], f"workers do not load '{self.plugin}': {workers['errors']}"
        assert not workers["errors"], f"workers find errors: {workers['errors']}"

    def _trainer(self, options: Mapping[str, Any], tiny_models: TinyModels, directory: Path, kind: Any = None) -> Any:
        """Return a trainer of one step over the plugin, and over an adapter if it does not add one itself."""
        hosts = _hugging_face()
        from transformers import Trainer

        plugins = {self.plugin: options}
        adapters = [name for name in self.others if "adapter" in load_plugin(name).slots]
        if "adapter" not in load_plugin(self.plugin).slots:
            plugins |= {name: {} for name in adapters[:1]}
        args = hosts.ArcticTrainingArguments(
            **{**QUIET_RUN, "output_dir": str(directory), "max_steps": 1, "plugins": plugins}
        )
        stack = Stack.from_dict(plugins)
        model, tokenizer = hosts.load_model(tiny_models(self.model[0], **self.model[1]), stack)
        rows: Any = [{"input_ids": ids, "labels": ids} for ids in _ids().repeat(4, 1)]
        trainer = (kind or Trainer)(
            model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
        )
        return hosts.attach(trainer, stack)


def _hugging_face() -> Any:
    hosts = pytest.importorskip("arctic_plugins_huggingface", reason="arctic-plugins-huggingface is not installed")
    hosts.register()
    return hosts


def _registered(name: str, times: int) -> Registry:
    registry, manager = Registry(), new_plugin_manager(only=("register",))
    manager.register(load_plugin(name), name)
    for _ in range(times):
        manager.hook.register(registry=registry)
    return registry


def _targets(value: Any) -> Iterator[str]:
    """Yield every ``"module:attribute"`` in a registry."""
    if isinstance(value, str):
        if ":" in value:
            yield value
    elif isinstance(value, Mapping):
        yield from (target for each in value.values() for target in _targets(each))
    elif isinstance(value, list):
        yield from (target for each in value for target in _targets(each))
    elif is_dataclass(value):
        yield from (target for field in fields(value) for target in _targets(getattr(value, field.name)))


def _defines(module: str, name: str) -> bool:
    """Return whether the source of ``module`` defines or imports ``name``; importing it may need a missing host."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.has_location or spec.origin is None:
        return False
    if not spec.origin.endswith(".py"):
        return True
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return name in names


def _example(name: str) -> Mapping[str, Any]:
    """Return options with which a plugin can be enabled: the first example in the schema of its options, or none."""
    found: Mapping[str, Any] = next(iter(load_plugin(name).config.model_json_schema().get("examples", ({},))))
    return found


def _plain_name(name: str) -> str:
    """Return the name of a tensor without what PEFT adds to it (peft 0.21.0, ``PeftModel`` and ``BaseTunerLayer``)."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _frozen(model: Any) -> dict[str, Any]:
    """Return the name of every encoded weight, as in claims, and its description."""
    from arctic_plugins_huggingface.loading import frozen_weights

    found = frozen_weights(model).items()
    return {_plain_name(name).removesuffix(".weight"): module.frozen[leaf] for name, (module, leaf) in found}


def _tensors(model: Any) -> dict[str, Any]:
    """Return copies of all tensors of ``model``, by name and wherever they are, with encoded weights as their bytes."""
    from arctic_plugins_huggingface.loading import frozen_weights

    encoded = {
        f"{name}{suffix}": buffer
        for name, (module, leaf) in frozen_weights(model).items()
        for suffix, buffer in module.export(leaf).items()
    }
    return {_plain_name(name): tensor.clone() for name, tensor in {**model.state_dict(), **encoded}.items()}


def _ids() -> Any:
    import torch

    return torch.arange(10, 42)[None]


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(_ids()).logits
