"""Preferences: from a user's records to TRL's trainers over encoded weights."""

import json
import shutil

import pytest
import torch
from arctic_plugins_huggingface import load_model, merge_adapter
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_huggingface.loading.config import load_tokenizer
from arctic_plugins_huggingface.training.data import load_data
from arctic_plugins_huggingface.training.dry_run import make_plan
from arctic_plugins_huggingface.training.preparation import prepare
from arctic_plugins_huggingface.training.recipe import DataConfig, Recipe
from arctic_plugins_huggingface.training.run import train
from arctic_plugins_huggingface.training.trainers import TRAINERS, trl_trainer
from click.testing import CliRunner
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from arctic_plugins.cli import arctic
from arctic_plugins.errors import ConfigError, DataError, Diverged
from arctic_plugins.testing import MIXTURES, tiny_model


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


PAIRS = [
    {"prompt": [user(f"Number {n}?")], "chosen": [assistant(str(n))], "rejected": [assistant("I do not know.")]}
    for n in range(8)
]


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def recipe(directory, checkpoint, trainer="dpo", records=PAIRS, plugins=None, **training):
    write(directory / "data.jsonl", records)
    content = {
        "model": str(checkpoint),
        "plugins": {"fp8": {}, "lora": {"r": 4}} if plugins is None else plugins,
        "data": {"path": "data.jsonl", "format": "preference", "max_length": 128},
        "training": {
            "trainer": trainer,
            "output_dir": str(directory / "out"),
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "bf16": False,
            "seed": 0,
            **training,
        },
    }
    (directory / "recipe.yaml").write_text(json.dumps(content))
    return Recipe.from_file(directory / "recipe.yaml")


def losses(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="module")
def tuned(tiny_checkpoint, tmp_path_factory):
    """A run of DPO over fp8 with LoRA, and its recipe."""
    directory = tmp_path_factory.mktemp("dpo")
    made = recipe(directory, tiny_checkpoint, beta=0.5, label_smoothing=0.1, loss_type=["robust"])
    return made, train(made)


def test_dpo_learns_to_prefer_over_encoded_weights(tuned):
    _, result = tuned
    assert losses(result)[-1] < losses(result)[0] - 0.2
    log = [entry for entry in result.history if "rewards/margins" in entry]
    assert log[0]["rewards/margins"] == 0
    assert log[-1]["rewards/margins"] > 1
    assert result.tokens > 0


def test_its_reference_is_the_model_without_its_adapter(tuned, tiny_checkpoint):
    """The rewards that it logs are those of an untouched model."""
    made, result = tuned
    assert set(result.model.peft_config) == {"default"}
    assert not [name for name in load_file(result.directory / "adapter_model.safetensors") if "ref" in name]
    ids = torch.arange(1, 20)[None]
    plain, _ = load_model(tiny_checkpoint, prepare(made).stack.only("weight_codec"))
    with torch.no_grad(), result.model.disable_adapter():
        assert torch.equal(result.model(ids).logits, plain(ids).logits)
    adapted, _ = load_checkpoint(result.directory)
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, result.model.eval()(ids).logits)
        assert not torch.equal(adapted(ids).logits, plain(ids).logits)


class Stopped(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == 2


def test_a_resumed_run_is_the_run_that_it_continues(tuned, tiny_checkpoint, tmp_path):
    made, whole = tuned
    shutil.copy(made.data.path, tmp_path / "data.jsonl")
    output = {**made.training, "output_dir": str(tmp_path / "out")}
    again = made.model_copy(update={"training": output})
    train(again, callbacks=[Stopped()])
    shutil.rmtree(tmp_path / "out" / "final")
    assert losses(train(again, resume=True)) == losses(whole)
    other = made.model_copy(update={"training": {**output, "beta": 0.7}})
    shutil.rmtree(tmp_path / "out" / "final")
    with pytest.raises(ConfigError, match=r"training\.beta was 0\.5 and is 0\.7"):
        train(other, resume=True)


def test_the_trainers_answer_as_their_plugins_made_them(tiny_checkpoint, tmp_path):
    """Mixins are composed over TRL's class: a loss that is not finite stops the run before it is learnt."""
    with pytest.raises(Diverged, match="is not finite"):
        train(recipe(tmp_path, tiny_checkpoint, learning_rate=1e30))


@pytest.mark.parametrize("trainer", ["kto", "orpo"])
def test_other_trainers_learn_likewise(tiny_checkpoint, tmp_path, trainer):
    result = train(recipe(tmp_path, tiny_checkpoint, trainer, beta=0.3))
    assert losses(result)[-1] < losses(result)[0]
    assert set(result.model.peft_config) == {"default"}
    assert result.counts.rows == (16 if trainer == "kto" else 8)


def test_a_reward_model_learns_which_answer_is_better(tiny_checkpoint, tmp_path):
    records = [*PAIRS, {**PAIRS[0], "chosen": [assistant("long " * 200)]}]  # TRL leaves this one out
    result = train(recipe(tmp_path, tiny_checkpoint, "reward", records))
    assert (result.counts.rows, result.counts.dropped) == (9, 1)
    log = [entry for entry in result.history if "margin" in entry]
    assert log[-1]["margin"] > max(0.5, log[0]["margin"])
    merged = merge_adapter(result.directory, tmp_path / "merged")
    model, tokenizer = load_model(merged)
    assert (type(model).__name__, model.config.num_labels) == ("LlamaForSequenceClassification", 1)
    good, bad = (
        model(tokenizer.apply_chat_template([*pair["prompt"], *pair[key]], return_tensors="pt")["input_ids"]).logits
        for pair in PAIRS[:1]
        for key in ("chosen", "rejected")
    )
    assert good > bad


def test_dpo_over_the_encoded_experts_of_a_mixture(tmp_path):
    model_type, config = MIXTURES["qwen3_moe"]
    checkpoint = tiny_model(tmp_path / "model", model_type, **config)
    result = train(recipe(tmp_path, checkpoint, plugins={"fp8": {}, "lora": {"r": 2, "experts": True}}))
    margins = [entry["rewards/margins"] for entry in result.history if "rewards/margins" in entry]
    assert margins[0] == 0
    assert margins[-1] > 0.5
    assert set(result.model.peft_config) == {"default"}


def test_an_adapter_that_changes_the_model_from_the_start_keeps_its_copy(tiny_checkpoint):
    """Then the model without its adapter is not the model before training."""
    from arctic_plugins_huggingface.training.run import REFERENCE, _without_reference
    from peft import get_peft_model

    for start, kept in ((True, False), (False, True)):
        model, _ = load_model(tiny_checkpoint)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        adapted.add_adapter(REFERENCE, config)
        _without_reference(adapted)
        assert (REFERENCE in adapted.peft_config) == kept


def test_the_command_trains_and_says_what_it_skipped(tiny_checkpoint, tmp_path):
    recipe(tmp_path, tiny_checkpoint, max_steps=2)
    content = json.loads((tmp_path / "recipe.yaml").read_text())
    content["data"]["on_bad_record"] = "skip"
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    write(tmp_path / "data.jsonl", [*PAIRS, {"prompt": "a"}])
    for options in (["--dry-run"], []):
        done = CliRunner().invoke(arctic, ["train", str(tmp_path / "recipe.yaml"), *options])
        assert done.exit_code == 0, done.output
        told = "".join(done.output.split())
        assert "1recordsskipped:" in told
        assert "data.jsonl:9hasno'chosen'" in told
    model, _ = load_checkpoint(tmp_path / "out" / "final")
    assert set(model.peft_config) == {"default"}


def test_a_dry_run_counts_pairs(tiny_checkpoint, tmp_path):
    plan = make_plan(prepare(recipe(tmp_path, tiny_checkpoint, num_train_epochs=3, max_steps=-1)))
    assert (plan.rows, plan.steps) == (8, 6)
    assert plan.data.startswith("8 rows, ")


SPELLINGS = {
    "messages": PAIRS[0],
    "one message": {**PAIRS[0], "chosen": assistant("0"), "rejected": assistant("I do not know.")},
    "whole chats": {
        "prompt": "Number 0?",
        "chosen": [user("Number 0?"), assistant("0")],
        "rejected": [user("Number 0?"), assistant("I do not know.")],
    },
    "a question": {**PAIRS[0], "prompt": "Number 0?"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Number 0?"}],
        "chosen": {"from": "gpt", "value": "0"},
        "rejected": {"from": "gpt", "value": "I do not know."},
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_preferences_in_several_spellings(tokenizer, tmp_path, spelling):
    path = write(tmp_path / "data.jsonl", [SPELLINGS[spelling]])
    data = load_data(DataConfig(path=str(path), format="preference"), tokenizer, trainer=TRAINERS["dpo"])
    assert data.train[0] == {**PAIRS[0], "tools": None}
    rendered = "<|user|>Number 0?<|end|><|assistant|>{}<|end|>"
    texts = [rendered.format(answer) for answer in ("0", "I do not know.")]
    assert data.counts.tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)


def test_tools_and_calls_reach_the_template(tokenizer, tmp_path):
    """Calls have arguments of their own: no null of another record is added."""
    before, seen = tokenizer.chat_template, []
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|end|>{% endfor %}"
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    records = [
        {
            "prompt": [user("?")],
            "chosen": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}],
            "rejected": [assistant("no")],
            "tools": [tool],
        }
        for arguments in ({"city": "Rome"}, {"day": 1})
    ]
    path = write(tmp_path / "data.jsonl", records)
    config = DataConfig(path=str(path), format="preference")
    try:
        data = load_data(config, tokenizer, trainer=TRAINERS["dpo"])
        for row in data.train:
            tools = json.loads(row["tools"])
            seen.append(tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tools=tools, tokenize=False))
        with pytest.raises(DataError, match=r"data\.jsonl:1 has tools, which TRL's trainer 'orpo' does not show"):
            load_data(config, tokenizer, trainer=TRAINERS["orpo"])
    finally:
        tokenizer.chat_template = before
    assert [text.split("assistant:")[1] for text in seen] == ['{"city": "Rome"}<|end|>', '{"day": 1}<|end|>']
    assert all('"name": "f"' in text for text in seen)


def test_texts_and_messages_are_not_mixed(tokenizer, tmp_path):
    texts = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path, other = write(tmp_path / "data.jsonl", [PAIRS[0], texts]), write(tmp_path / "other.jsonl", [texts])
    with pytest.raises(DataError, match=r"data\.jsonl has both texts and lists of messages, for example 'a'"):
        load_data(DataConfig(path=str(path), format="preference"), tokenizer, trainer=TRAINERS["dpo"])
    sources = [{"path": str(write(tmp_path / "data.jsonl", PAIRS))}, {"path": str(other)}]
    with pytest.raises(DataError, match="some of data.sources have texts"):
        load_data(DataConfig(sources=sources, format="preference"), tokenizer, trainer=TRAINERS["dpo"])


def test_kto_takes_answers_with_labels(tokenizer, tmp_path):
    records = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "chosen": "d", "rejected": "e"}]
    path = write(tmp_path / "data.jsonl", records)
    config = DataConfig(path=str(path), format="preference")
    rows = list(load_data(config, tokenizer, trainer=TRAINERS["kto"]).train)
    assert [(row["prompt"], row["completion"], row["label"]) for row in rows] == [
        ("a", "b", True),
        ("c", "d", True),
        ("c", "e", False),
    ]
    with pytest.raises(DataError, match=r"data\.jsonl:1 has one answer and a label.*set training\.trainer to kto"):
        load_data(config, tokenizer, trainer=TRAINERS["dpo"])


def test_pairs_without_room_for_an_answer_are_dropped(tokenizer, tmp_path):
    path = write(tmp_path / "data.jsonl", [{**PAIRS[0], "prompt": [user("long " * 20)]}, PAIRS[0]])
    config = DataConfig(path=str(path), format="preference", max_length=40)
    data = load_data(config, tokenizer, trainer=TRAINERS["dpo"])
    assert (len(data.train), data.counts.dropped, data.counts.truncated) == (1, 1, 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no 'rejected'"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "do not begin with the same message"),
        ({**PAIRS[0], "rejected": [user("a")]}, "no message with the role 'assistant' in 'rejected'"),
        ({**PAIRS[0], "rejected": "a"}, "has rejected='a'"),
        ({"prompt": "a", "completion": "b", "label": 1}, "has label=1; expected true or false"),
    ],
)
def test_preferences_that_are_wrong_are_told(tokenizer, tmp_path, record, message):
    path = write(tmp_path / "data.jsonl", [record])
    with pytest.raises(DataError, match=rf"data\.jsonl:1 .*{message}"):
        load_data(DataConfig(path=str(path), format="preference"), tokenizer, trainer=TRAINERS["dpo"])


@pytest.mark.parametrize(
    ("trainer", "form", "message"),
    [
        ("dpo", "alpaca", r"training\.trainer is 'dpo', but data\.format is 'alpaca'"),
        ("sft", "preference", r"training\.trainer is 'sft', .*one of the trainers dpo, kto, orpo"),
        ("dop", "preference", r"training\.trainer 'dop' is not .*did you mean 'dpo'"),
        (["dpo"], "preference", r"is not a trainer"),
    ],
)
def test_trainers_that_do_not_fit_are_told(tiny_checkpoint, tmp_path, trainer, form, message):
    made = recipe(tmp_path, tiny_checkpoint, trainer)
    with pytest.raises(ConfigError, match=message):
        prepare(made.model_copy(update={"data": DataConfig(path=made.data.path, format=form)}))


def test_arguments_are_those_of_the_trainers_config(tiny_checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"training\.betta is not a training argument; did you mean 'beta'"):
        prepare(recipe(tmp_path, tiny_checkpoint, betta=1))
    with pytest.raises(ConfigError, match=r"training\.packing is not a training argument"):
        prepare(recipe(tmp_path, tiny_checkpoint, packing=True))
    with pytest.raises(ConfigError, match=r"training\.loss_type is 3; expected"):
        prepare(recipe(tmp_path, tiny_checkpoint, loss_type=3))


def test_texts_are_not_split_over_processes(tiny_checkpoint, tmp_path):
    plugins = {"lora": {}, "longseq": {"sequence_parallel": 2}}
    with pytest.raises(ConfigError, match="'dpo', which compares whole texts, but the plugin 'longseq' splits them"):
        prepare(recipe(tmp_path, tiny_checkpoint, plugins=plugins))


def test_a_trainer_that_the_installed_trl_lacks_is_told(monkeypatch):
    import arctic_plugins_huggingface.training.trainers as trainers

    gone = trainers.TRLTrainer("orpo", "ORPO", "experimental/gone.py", "trl.experimental.gone")
    monkeypatch.setattr(trainers, "TRAINERS", {"orpo": gone})
    with pytest.raises(ConfigError, match=r"the installed trl \S+ has no trainer 'orpo'"):
        trl_trainer("orpo")
    monkeypatch.setattr(trainers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="TRL is not installed; run 'pip install trl'"):
        trl_trainer("orpo")


def test_every_trainer_of_the_table_is_where_it_says():
    for trainer in TRAINERS.values():
        kind, config = trl_trainer(trainer.name).load()
        assert issubclass(kind, Trainer)
        assert config.__name__ == f"{trainer.classes}Config"
