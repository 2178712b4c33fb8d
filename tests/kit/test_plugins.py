"""Each law of plugins finds a plugin that breaks it."""

import os

import pytest

from arctic_plugins.testing import PluginSuite

SOUND = '''
from arctic_plugins import Plugin, PluginConfig, hookimpl

class Options(PluginConfig):
    size: int = 8
    """How large it is."""

class Mixin:
    def log(self, logs, *args, **kwargs):
        super().log({**logs, "kit": 1.0}, *args, **kwargs)

class plugin(Plugin):
    name, config, times = "kit", Options, 0
    trainer_mixins = ("kit_plugin:Mixin",)

    @classmethod
    @hookimpl
    def register(cls, registry):
        cls.times += 1
        registry.environment("kit_plugin:Options")

    @hookimpl
    def claim(self, modules):
        return []

    @hookimpl
    def hf_transform_model(self, model):
        return model

    @hookimpl
    def hf_attach_trainer(self, trainer):
        pass
'''
TRAINS = """
        from transformers import TrainerCallback
        class Changes(TrainerCallback):
            def on_step_end(self, args, state, control, model, **kwargs):
                model.base_model.model.lm_head.weight.data.mul_(2)
        trainer.add_callback(Changes())
"""
ALONE = """
    @hookimpl
    def validate(self, stack):
        from arctic_plugins.errors import ResolveError
        if "fp8" in stack:
            raise ResolveError("another plugin is enabled")
"""
MUTANTS = {
    "importing_it_loads_neither_torch_nor_a_host": ("\nclass Options", "\nimport torch\nclass Options"),
    "registering_twice_changes_nothing": ('"kit_plugin:Options"', 'f"kit_plugin:Options{cls.times}"'),
    "what_it_registers_exists": ('"kit_plugin:Options"', '"kit_plugin:Option"'),
    "options_go_to_a_checkpoint_and_back": (
        "    size: int",
        "    def model_dump(self, **options):\n        return {'size': 9}\n\n    size: int",
    ),
    "options_are_immutable_and_closed": (
        "    size: int",
        "    model_config = {'frozen': False}\n    size: int",
    ),
    "options_have_a_schema_with_descriptions": ('"""How large it is."""', ""),
    "what_is_claimed_is_what_changes": (
        "return model\n",
        "model.lm_head.weight.data.mul_(2)\n        return model\n",
    ),
    "a_saved_checkpoint_computes_the_same": (
        "return model\n",
        "model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)\n        return model\n",
    ),
    "a_training_step_changes_only_what_is_trained": ("        pass\n", TRAINS),
    "what_it_adds_to_a_trainer_calls_the_trainer": ("super().log(", "print("),
    "it_composes_with": (
        "    @hookimpl\n    def hf_transform_model",
        f"{ALONE}    @hookimpl\n    def hf_transform_model",
    ),
    "it_is_registered_in_a_worker": ("", ""),
}
WORKERS = {"kit": {"plugins": ["kit"], "errors": []}, "broken": {"plugins": [], "errors": ["kit is not loaded"]}}


class Suite(PluginSuite):
    plugin = "kit"


@pytest.fixture
def kit(install_plugin, tiny_models, monkeypatch):
    """A function that installs a plugin from source, and returns arguments for the laws."""

    def install(source, workers="kit"):
        site = install_plugin("kit", source)
        monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        return {"options": {}, "other": "fp8", "tiny_models": tiny_models, "workers": WORKERS[workers]}

    return install


def test_a_sound_plugin_breaks_none(broken_laws, kit):
    assert broken_laws(Suite(), **kit(SOUND)) == set()


@pytest.mark.parametrize("law", MUTANTS)
def test_a_broken_plugin_breaks_its_law(broken_laws, kit, law):
    before, after = MUTANTS[law]
    assert before in SOUND
    assert broken_laws(Suite(), only=law, **kit(SOUND.replace(before, after), "kit" if before else "broken")) == {law}


def test_a_mixin_that_expects_to_be_initialized_breaks_its_law(broken_laws, kit):
    law, source = "what_it_adds_to_a_trainer_calls_the_trainer", "class Mixin:\n    def __init__(self): self.sum = 0\n"
    assert broken_laws(Suite(), only=law, **kit(SOUND.replace("class Mixin:\n", source))) == {law}


def test_every_law_has_a_mutant():
    assert {f"test_{law}" for law in MUTANTS} == PluginSuite.laws().keys()
