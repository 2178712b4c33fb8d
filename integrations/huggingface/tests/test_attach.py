"""What ``attach`` makes of a Trainer: one subclass of its class, composed of what the host and the plugins add."""

import json

import pytest
from arctic_plugins_huggingface import attach, load_model
from arctic_plugins_huggingface.training.mixins import mixins_of
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from arctic_plugins import Plugin, Stack
from arctic_plugins.cli import main
from arctic_plugins.errors import ConfigError

OPTIONS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 1, "logging_steps": 1}
CALLS = []


class Tells(Trainer):
    """A plugin author's mixin."""

    def on_attach(self, plugin):
        self.told = plugin.name

    def training_step(self, *args, **kwargs):
        CALLS.append(f"{type(self).__name__}: {self.told}")
        return super().training_step(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "told": 1.0}, *args, **kwargs)


class Outer(Trainer):
    """One of a plugin that comes later."""

    def training_step(self, *args, **kwargs):
        CALLS.append("outer")
        return super().training_step(*args, **kwargs)


class First(Plugin):
    name = "first"
    before = frozenset({"second"})

    @property
    def trainer_mixins(self):
        return (f"{__name__}:Tells",)


class Second(Plugin):
    name = "second"

    @property
    def trainer_mixins(self):
        return (f"{__name__}:Outer",)


@pytest.fixture
def parts(tiny_checkpoint):
    """A model with an adapter, its tokenizer, rows, and a stack of two authors' plugins beside ours."""
    ours = Stack.from_dict({"fp8": {}, "lora": {"r": 4}, "longseq": {}})
    model, tokenizer = load_model(tiny_checkpoint, ours)
    ids = tokenizer("the number 12 the number 12")["input_ids"]
    CALLS.clear()
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 8)
    return model, tokenizer, rows, ours.plus(Stack((Second.from_options({}), First.from_options({}))))


@pytest.mark.parametrize(("kind", "arguments"), [(Trainer, TrainingArguments), (SFTTrainer, SFTConfig)])
def test_a_trainer_gets_one_subclass_in_the_order_of_the_stack(parts, tmp_path, kind, arguments):
    model, tokenizer, rows, stack = parts
    args = arguments(output_dir=str(tmp_path), **OPTIONS)
    trainer = attach(kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer), stack)
    assert isinstance(trainer, kind)
    assert type(trainer).__name__ == f"Arctic{kind.__name__}"
    assert repr(trainer) == (
        f"<Arctic{kind.__name__}: FiniteSteps (host), Tells (first), TiledEvaluation (longseq), Outer (second)>"
    )
    assert [mixin.__name__ for mixin, _ in mixins_of(trainer)] == ["FiniteSteps", "Tells", "TiledEvaluation", "Outer"]
    assert not {"training_step", "log", "save_model"} & vars(trainer).keys()  # nothing of a live trainer is replaced
    trainer.train()
    assert ["outer", f"Arctic{kind.__name__}: first"] == CALLS
    assert all(entry["told"] == 1.0 for entry in trainer.state.log_history)


def test_a_trainer_is_attached_once(parts, tmp_path):
    model, _, rows, stack = parts
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), **OPTIONS), train_dataset=rows)
    attach(trainer, stack)
    with pytest.raises(ConfigError, match="already attached to a stack; call attach only once"):
        attach(trainer, stack)
    other = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), **OPTIONS), train_dataset=rows)
    assert type(other) is Trainer
    assert mixins_of(other) == ()


def test_a_slot_that_is_left_out_adds_nothing_to_a_trainer():
    stack = Stack.from_dict({"longseq": {"sequence_parallel": 2}, "moe": {}})
    assert [target.partition(":")[2] for target, _ in stack.trainer_mixins()] == [
        "LogsRouters",
        "TiledEvaluation",
        "SharedTexts",
    ]
    assert [plugin.name for _, plugin in stack.without("loss", "attention").trainer_mixins()] == ["moe"]


def test_what_a_plugin_adds_to_a_trainer_is_shown(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["plugins", "moe"])
    assert "Adds to the Trainer: arctic_plugins_moe.training:LogsRouters" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["plugins", "longseq", "--json"])
    assert json.loads(capsys.readouterr().out)["trainer_mixins"] == ["arctic_plugins_longseq.hf:TiledEvaluation"]
