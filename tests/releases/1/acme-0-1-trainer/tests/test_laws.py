"""The laws of plugins, among them those of mixins, and a story of a user."""

import pytest
from arctic_plugins import Stack
from arctic_plugins.testing import QUIET_RUN, PluginSuite
from arctic_plugins_huggingface import ArcticTrainingArguments, attach, load_model
from transformers import Trainer


class TestPlugin(PluginSuite):
    plugin = "acme-0-1-trainer"
    options = [{}, {"decay": 0.5}]


def test_the_logs_of_a_run_have_the_average(tiny_checkpoint, tmp_path):
    args = ArcticTrainingArguments(**QUIET_RUN, output_dir=tmp_path, max_steps=3, plugins={"acme-0-1-trainer": {"decay": 0.5}})
    stack = Stack.from_dict(args.plugins)
    model, tokenizer = load_model(tiny_checkpoint, stack)
    ids = tokenizer("A text of some tokens", return_tensors="pt").input_ids[0]
    rows = [{"input_ids": ids, "labels": ids}] * 8
    trainer = attach(Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer), stack)
    trainer.train()
    first, second, third = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss_average"] == first["loss"]
    assert second["loss_average"] == pytest.approx((first["loss"] + second["loss"]) / 2)
    assert third["loss_average"] == pytest.approx((second["loss_average"] + third["loss"]) / 2)
