"""Each law of architectures finds one that breaks it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from arctic_plugins_huggingface import register
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from arctic_plugins import ModelClasses, process_registry
from arctic_plugins.testing import ModelSuite, tiny_model

forward = LlamaForCausalLM.forward


def sees_later_tokens(self, *args, **kwargs):
    output = forward(self, *args, **kwargs)
    output.logits = output.logits + output.logits.mean(1, keepdim=True)
    return output


def forgets(self, *args, past_key_values=None, **kwargs):
    return forward(self, *args, **kwargs)


def recomputes_otherwise(self, *args, **kwargs):
    output = forward(self, *args, **kwargs)
    if self.training and self.model.gradient_checkpointing:
        output.loss = 2 * output.loss
    return output


def with_unused(self, config):
    LlamaForCausalLM.__init__(self, config)
    self.unused = torch.nn.Parameter(torch.zeros(1))


def saves_doubled(self, *args, **kwargs):
    weight = self.lm_head.weight.data
    weight.mul_(2)
    LlamaForCausalLM.save_pretrained(self, *args, **kwargs)
    weight.div_(2)


def forgets_range(self):
    return {key: value for key, value in LlamaConfig.to_dict(self).items() if key != "initializer_range"}


CLASSES, CONFIG, SAVED, CAUSAL, CACHE, GRADIENTS, RECOMPUTED = (
    "classes_are_those_of_the_type",
    "config_goes_to_a_checkpoint_and_back",
    "a_saved_checkpoint_computes_the_same",
    "tokens_do_not_see_later_ones",
    "a_cache_changes_nothing",
    "gradients_reach_every_parameter",
    "recomputation_changes_no_gradient",
)
MUTANTS = {
    "sound": ({}, {}, set()),
    "other class": ({"config_class": LlamaConfig}, {}, {CLASSES}),
    "config": ({}, {"to_dict": forgets_range}, {CONFIG}),
    "saved": ({"save_pretrained": saves_doubled}, {}, {SAVED}),
    "later tokens": ({"forward": sees_later_tokens}, {}, {CAUSAL, CACHE}),
    "cache": ({"forward": forgets}, {}, {CACHE}),
    "gradients": ({"__init__": with_unused}, {}, {GRADIENTS}),
    "recomputed": ({"forward": recomputes_otherwise}, {}, {RECOMPUTED}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_architecture_breaks_its_law_and_no_other(broken_laws, tmp_path, monkeypatch, name):
    register()
    of_model, of_config, laws = MUTANTS[name]
    kind = "kit-" + name.replace(" ", "-")
    config = type("KitConfig", (LlamaConfig,), {"model_type": kind, **of_config})
    base = type("KitModel", (LlamaModel,), {"config_class": config})
    causal = type("KitForCausalLM", (LlamaForCausalLM,), {"config_class": config, "__module__": __name__, **of_model})
    monkeypatch.setitem(sys.modules, "kit_classes", SimpleNamespace(config=config, base=base, causal=causal))
    classes = ModelClasses(
        config="kit_classes:config",
        base="kit_classes:base",
        causal_lm="kit_classes:causal",
        vllm="arctic_plugins:Stack",
    )
    monkeypatch.setitem(process_registry().models, kind, classes)
    AutoConfig.register(kind, config, exist_ok=True)
    AutoModel.register(config, base, exist_ok=True)
    if not of_model.get("config_class"):
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
    else:
        AutoModelForCausalLM.register(config, type("Kit", (LlamaForCausalLM,), {"config_class": config}), exist_ok=True)
    suite = type("Suite", (ModelSuite,), {"model_type": kind, "config": {"initializer_range": 0.3}})()
    checkpoints = {}

    def once(model_type, **config):
        if not checkpoints:
            checkpoints[model_type] = tiny_model(tmp_path / "model", model_type, **config)
        return checkpoints[model_type]

    assert broken_laws(suite, tiny_models=once) == laws


def test_every_law_has_a_mutant():
    assert {f"test_{law}" for _, _, laws in MUTANTS.values() for law in laws} == ModelSuite.laws().keys()
