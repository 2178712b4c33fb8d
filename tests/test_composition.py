"""Parts by different hands, in one stack: two codecs, a placement, an adapter, any order."""

import json
import shutil

import pytest
import torch
from arctic_plugins_huggingface import ArcticTrainingArguments, attach, load_model, merge_adapter, save_checkpoint
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_huggingface.loading.config import load_config, skeleton
from arctic_plugins_huggingface.loading.plan import planned_config
from arctic_plugins_huggingface.loading.weights import weight_specs
from transformers import Trainer

from arctic_plugins import Stack, UserError
from arctic_plugins.errors import ClaimError, ConfigError
from arctic_plugins.frozen import FrozenLinear
from arctic_plugins.testing import draw_adapter

pytestmark = pytest.mark.usefixtures("int8_plugin")

IDS = torch.arange(10, 42)[None]
CODECS = {"fp8": {"include": ["**.mlp.*"]}, "int8": {}}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_two_codecs_on_different_modules_save_and_reload(tiny_checkpoint, tmp_path):
    stack = Stack.from_dict(CODECS)
    model, tokenizer = load_model(tiny_checkpoint, stack)
    kinds = {
        name.split(".")[-1]: module.codec.type
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear)
    }
    assert kinds == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "test-int8"),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "fp8"),
    }
    assert model.config.int8_was_here
    expected = logits(model)
    save_checkpoint(model, tokenizer, tmp_path / "out", stack)
    assert torch.equal(logits(load_model(tmp_path / "out")[0]), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {codec["type"] for codec in config["codecs"].values()} == {"fp8", "test-int8"}


def test_two_codecs_on_one_module_are_an_error_that_names_both(tiny_checkpoint):
    with pytest.raises(ClaimError, match=r"'fp8' and 'int8' both claim model\.layers\.0\.self_attn\.q_proj"):
        load_model(tiny_checkpoint, Stack.from_dict({"int8": {}, "fp8": {}}))


def test_a_plugins_validation_stops_the_load(tiny_checkpoint, caplog):
    with pytest.raises(UserError, match="int8 refuses llama on (cpu|cuda)"):
        load_model(tiny_checkpoint, Stack.from_dict({"int8": {"refuse": True}}))
    load_model(tiny_checkpoint, Stack.from_dict({"int8": {}}))
    assert "int8: 1 plugins on" in caplog.text


def test_bytes_on_disk_compute_the_same(tiny_checkpoint, tmp_path):
    resident, _ = load_model(tiny_checkpoint, Stack.from_dict({"int8": {}}))
    spooled, tokenizer = load_model(
        tiny_checkpoint, stack := Stack.from_dict({"int8": {"spool": str(tmp_path / "spool")}})
    )
    layer = spooled.model.layers[0].self_attn.q_proj
    assert layer.weight.numel() == 0
    assert layer.handle is not None
    assert torch.equal(logits(spooled), logits(resident))
    save_checkpoint(spooled, tokenizer, tmp_path / "out", stack)
    assert torch.equal(logits(load_model(tmp_path / "out")[0]), logits(resident)), "reload resident"
    again, _ = load_model(tmp_path / "out", Stack.from_dict({"int8": {"spool": str(tmp_path / "spool2")}}))
    assert again.model.layers[0].self_attn.q_proj.handle is not None
    assert torch.equal(logits(again), logits(resident)), "reload spooled"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_train_and_merge_over_two_codecs_and_a_placement(tiny_checkpoint, tmp_path, checkpointing):
    losses = {}
    for where in ("resident", "spooled"):
        log, spool = tmp_path / f"{where}.log", str(tmp_path / f"spool-{where}") if where == "spooled" else None
        plugins = {"fp8": CODECS["fp8"], "int8": {"spool": spool, "log_to": str(log)}, "lora": {"r": 4, "alpha": 16}}
        args = ArcticTrainingArguments(
            output_dir=str(tmp_path / where),
            max_steps=4,
            save_steps=4,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=checkpointing,
            plugins=plugins,
        )
        assert args.logging_steps == 1
        stack = Stack.from_dict(plugins)
        torch.manual_seed(0)
        model, tokenizer = load_model(tiny_checkpoint, stack)
        rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 16
        trainer = attach(Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer), stack)
        trainer.train()
        losses[where] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert log.read_text().split() == ["1", "2", "3", "4"]
        adapter = tmp_path / where / "checkpoint-4"
        merged, _ = load_model(merge_adapter(adapter, tmp_path / f"merged-{where}"))
        assert {module.codec.type for module in merged.modules() if isinstance(module, FrozenLinear)} == {
            "fp8",
            "test-int8",
        }
        trained = logits(load_checkpoint(adapter)[0])
        assert (logits(merged) - trained).norm() / trained.norm() < 0.5
        model.merge_adapter()
        assert (logits(model) - trained).norm() / trained.norm() < 0.5
    assert losses["resident"] == losses["spooled"]
    assert losses["resident"][-1] < losses["resident"][0]


def test_a_plugin_that_fills_two_slots_keeps_one_without_the_other(tiny_checkpoint, tmp_path):
    spool = tmp_path / "spool"
    stack = Stack.from_dict({"int8": {"spool": str(spool)}, "lora": {"r": 4}})
    config = load_config(str(tiny_checkpoint))
    for part, slots in (
        (stack, {"weight_codec", "placement"}),
        (stack.without("placement"), {"weight_codec"}),
        (stack.only("weight_codec"), {"weight_codec"}),
        (stack.only("placement"), {"placement"}),
        (stack.without("placement").without("adapter"), {"weight_codec"}),
        (stack.without("placement", "weight_codec"), set()),
    ):
        assert part.claim(config, weight_specs(skeleton(config))).by_slot.keys() == slots
    assert "int8" not in stack.without("placement", "weight_codec")
    assert "quantization_config" in planned_config(tiny_checkpoint, Stack.from_dict({"int8": {}})), (
        "what 'arctic serve --plugins int8' serves"
    )
    other = Stack.from_dict({"int8": {"include": ["**.mlp.*"]}, "lora": {"r": 4}})
    assert other.without("placement").sha256() != stack.without("placement").sha256(), "--resume tells them apart"


def test_an_adapter_over_a_codec_that_places_keeps_it(tiny_checkpoint, tmp_path):
    spool = tmp_path / "spool"
    stack = Stack.from_dict({"int8": {"spool": str(spool)}, "lora": {"r": 4}})
    model, tokenizer = load_model(tiny_checkpoint, stack)
    draw_adapter(model)
    expected = logits(model)
    save_checkpoint(model, tokenizer, tmp_path / "adapter", stack)
    shutil.rmtree(spool)
    again, _ = load_checkpoint(tmp_path / "adapter")
    assert not spool.exists(), "no placement is taken from a checkpoint"
    assert any(isinstance(module, FrozenLinear) for module in again.modules())
    assert torch.equal(logits(again), expected)
    with pytest.raises(ConfigError, match="plugin 'int8' is enabled twice: by the checkpoint and in addition to it"):
        load_checkpoint(tmp_path / "adapter", Stack.from_dict({"int8": {}}))
