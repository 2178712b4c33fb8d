"""Liger's kernels: which of them are used with what, and one line where they cannot be.

The kernels need a GPU. What decides about them does not: the package's entry point is replaced by one that records what
it is asked for, and the rest is real.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from arctic_plugins_huggingface import ArcticTrainingArguments, attach, load_model
from arctic_plugins_huggingface.training import liger
from arctic_plugins_huggingface.training.arguments import training_arguments
from arctic_plugins_huggingface.training.recipe import Recipe
from transformers import Trainer

from arctic_plugins import Stack
from arctic_plugins.errors import ConfigError
from arctic_plugins.testing import MIXTURES, tiny_model

ROWS = [{"input_ids": torch.arange(10, 20), "labels": torch.arange(10, 20)}] * 4
LORA = {"lora": {"r": 2}}
HEAD = {"fp8": {"include": ["lm_head"], "exclude": []}, **LORA}
ADAPTED = {"lora": {"r": 2, "target_modules": ["q_proj", "lm_head"]}}
LOSS, MLP = {"fused_linear_cross_entropy": False}, {"swiglu": False, "geglu": False}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    model_type, config = MIXTURES["mixtral"]
    return tiny_model(tmp_path_factory.mktemp("models") / "mixtral", model_type, **config)


@pytest.fixture
def asked(monkeypatch):
    """What Liger was asked for, as if it and a GPU were there."""
    found = []
    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    transformers._apply_liger_kernel_to_instance = lambda model, **kernels: found.append(kernels)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(liger, "torch", SimpleNamespace(accelerator=SimpleNamespace(is_available=lambda: True)))
    return found


def trainer(checkpoint, output, plugins, **options):
    args = ArcticTrainingArguments(
        output_dir=str(output), plugins=plugins, max_steps=1, report_to="none", save_strategy="no", **options
    )
    stack = Stack.from_dict(plugins)
    model, _ = load_model(checkpoint, stack)
    return attach(Trainer(model=model, args=args, train_dataset=ROWS), stack)


@pytest.mark.parametrize(
    ("plugins", "off"),
    [
        (LORA, {}),
        ({"fp8": {}, **LORA}, {}),
        (HEAD, LOSS),
        (ADAPTED, LOSS),
        ({"longseq": {}, **LORA}, LOSS),
        ({"longseq": {"tiled_mlp": True}, "fp8": {}, **LORA}, {**LOSS, **MLP}),
    ],
)
def test_what_would_be_bypassed_is_left_to_the_model(tiny_checkpoint, tmp_path, caplog, asked, plugins, off):
    run = trainer(tiny_checkpoint, tmp_path, plugins, use_liger_kernel=True)
    run.train()
    assert run.evaluate(ROWS, metric_key_prefix="eval")["eval_loss"] > 0, "transformers asks for no logits"
    assert asked == [off]
    assert ("fused_linear_cross_entropy is off" in caplog.text) == bool(off)


@pytest.mark.parametrize(
    ("plugins", "reason"),
    [
        ({"fp8": {}, **LORA}, "of model.layers.0.mlp.experts, and these are encoded"),
        ({"lora": {"r": 2, "experts": True}}, "of model.layers.0.mlp.experts, and these are adapted"),
    ],
)
def test_experts_that_are_not_plain_compute_themselves(mixture, tmp_path, caplog, asked, plugins, reason):
    trainer(mixture, tmp_path, plugins, use_liger_kernel=True).train()
    assert asked == [MLP]
    assert reason in caplog.text


def test_what_is_asked_for_and_would_be_bypassed_is_an_error(tiny_checkpoint, tmp_path, asked):
    options = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
    with pytest.raises(ConfigError, match="cross_entropy on, but LlamaForCausalLM computes its loss"):
        trainer(tiny_checkpoint, tmp_path, {"longseq": {}, **LORA}, **options)
    with pytest.raises(ConfigError, match=r"turns fused_linear_cross_entropy on, but .* this is encoded"):
        trainer(tiny_checkpoint, tmp_path, HEAD, **options)


def test_what_is_missing_is_one_line_before_anything_is_loaded(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text('{"text": "hello"}')
    recipe = Recipe.model_validate(
        {
            "model": str(tiny_checkpoint),
            "data": {"path": str(tmp_path / "data.jsonl"), "format": "text"},
            "training": {"output_dir": str(tmp_path / "out"), "use_liger_kernel": True, "use_cpu": True},
        }
    )
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ConfigError, match="liger-kernel is not installed; expected version 0.3.0 or later"):
        training_arguments(recipe)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    with pytest.raises(ConfigError, match="use_liger_kernel is on, but training runs on the CPU; expected a GPU"):
        training_arguments(recipe)
