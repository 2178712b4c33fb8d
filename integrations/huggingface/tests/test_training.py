"""Training with the ordinary Trainer, TRL's, and a recipe."""

import dataclasses
import importlib
import json
from collections import Counter

import pytest
import torch
from arctic_plugins_huggingface import ArcticTrainingArguments, attach, load_model, merge_adapter, plan_model
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_huggingface.generate import answer
from arctic_plugins_huggingface.training.data import load_data
from arctic_plugins_huggingface.training.preparation import prepare
from arctic_plugins_huggingface.training.recipe import DataConfig, Recipe
from arctic_plugins_huggingface.training.run import train
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from arctic_plugins import Stack
from arctic_plugins.errors import ArcticError, ConfigError, DataError, Diverged, PluginNotFoundError
from arctic_plugins.frozen import FrozenLinear
from arctic_plugins.provenance import read_provenance
from arctic_plugins.testing import tiny_model

PLUGINS = {"fp8": {}, "lora": {"r": 8, "alpha": 32}}
RECORDS = [{"instruction": f"Say the number {number}.", "output": str(number)} for number in range(10, 26)]
QUICK = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "seed": 0,
}


@pytest.fixture
def rows(tiny_checkpoint):
    _, tokenizer = load_model(tiny_checkpoint)
    return [
        {"input_ids": ids, "labels": ids}
        for ids in tokenizer(["the number 12 the number 12", "another number is 13 not 12"] * 8)["input_ids"]
    ]


def test_arguments_come_from_the_command_line(tmp_path):
    (args,) = HfArgumentParser(ArcticTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--plugins", json.dumps(PLUGINS)]
    )
    assert args.plugins == PLUGINS
    assert (
        Stack.from_dict(
            ArcticTrainingArguments(output_dir=str(tmp_path), plugins=args.to_dict()["plugins"]).plugins
        ).to_dict()
        == Stack.from_dict(PLUGINS).to_dict()
    )


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_arguments_come_from_a_file(tmp_path, suffix):
    path = tmp_path / f"args.{suffix}"
    path.write_text(json.dumps({"output_dir": str(tmp_path), "use_cpu": True, "plugins": PLUGINS}))  # JSON is YAML
    parser = HfArgumentParser(ArcticTrainingArguments)
    (args,) = parser.parse_yaml_file(str(path)) if suffix == "yaml" else parser.parse_json_file(str(path))
    assert args.plugins == PLUGINS


def test_every_training_argument_keeps_its_meaning(tmp_path):
    ours, theirs = (
        ArcticTrainingArguments(output_dir=str(tmp_path), use_cpu=True),
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True),
    )
    assert {field.name for field in dataclasses.fields(ours)} - {
        field.name for field in dataclasses.fields(theirs)
    } == {"plugins"}


def test_bad_plugins_are_known_when_the_arguments_are_made(tmp_path):
    with pytest.raises(PluginNotFoundError, match="did you mean 'lora'"):
        ArcticTrainingArguments(output_dir=str(tmp_path), plugins={"loar": {}})
    with pytest.raises(ConfigError, match="is not valid JSON"):
        ArcticTrainingArguments(output_dir=str(tmp_path), plugins="{fp8")


def test_lora_chooses_the_checkpointing_that_gives_gradients(tmp_path):
    args = ArcticTrainingArguments(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=True, plugins=PLUGINS)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    args = ArcticTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        gradient_checkpointing=True,
        plugins=PLUGINS,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": True}


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=["plain", "checkpointing", "bf16"]
)
def test_an_unmodified_trainer_trains_and_marks_its_checkpoints(tiny_checkpoint, rows, tmp_path, options):
    args = ArcticTrainingArguments(
        output_dir=str(tmp_path), max_steps=6, save_steps=3, plugins=PLUGINS, **QUICK, **options
    )
    stack = Stack.from_dict(args.plugins)
    model, tokenizer = load_model(tiny_checkpoint, stack)
    base = {name: buffer.clone() for name, buffer in model.state_dict().items() if "lora" not in name}
    trainer = attach(Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer), stack)
    assert type(trainer).__bases__[-1] is Trainer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(buffer, base[name]) for name, buffer in model.state_dict().items() if name in base), (
        "frozen weights changed"
    )
    for step in (3, 6):
        assert read_provenance(tmp_path / f"checkpoint-{step}").sha256 == stack.sha256()
    assert "model.safetensors" not in {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    restored, _ = load_checkpoint(tmp_path / "checkpoint-6")
    trained = {name: parameter for name, parameter in model.state_dict().items() if "lora" in name}
    assert trained
    assert all(torch.equal(parameter, restored.state_dict()[name]) for name, parameter in trained.items())


def test_checkpointing_does_not_change_the_losses(tiny_checkpoint, rows, tmp_path):
    losses = []
    for checkpointing in (False, True):
        args = ArcticTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            save_strategy="no",
            plugins=PLUGINS,
            gradient_checkpointing=checkpointing,
            **QUICK,
        )
        torch.manual_seed(0)
        stack = Stack.from_dict(PLUGINS)
        model, _ = load_model(tiny_checkpoint, stack)
        trainer = attach(Trainer(model=model, args=args, train_dataset=rows), stack)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_trls_sfttrainer_trains_likewise(tiny_checkpoint, tmp_path):
    stack = Stack.from_dict(PLUGINS)
    model, tokenizer = load_model(tiny_checkpoint, stack)
    data = tmp_path / "data.json"
    data.write_text(json.dumps(RECORDS))
    rows = load_data(DataConfig(path=str(data)), tokenizer).train
    args = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=6, save_steps=6, gradient_checkpointing=False, bf16=False, **QUICK
    )
    trainer = attach(SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer), stack)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert read_provenance(tmp_path / "out" / "checkpoint-6").stack == stack.to_dict()


def write_recipe(tmp_path, checkpoint, **changes):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record) for record in RECORDS))
    training = {"output_dir": str(tmp_path / "out"), "max_steps": 4, "save_strategy": "no", "bf16": False, **QUICK}
    recipe = {
        "model": str(checkpoint),
        "plugins": PLUGINS,
        "data": {"path": "data.jsonl", "max_length": 128},
        "training": training,
    }
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            recipe[section][leaf] = value
        else:
            recipe[section] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def test_a_recipe_trains_merges_and_answers(tiny_checkpoint, tmp_path):
    result = train(Recipe.from_file(write_recipe(tmp_path, tiny_checkpoint)))
    assert result.directory == tmp_path / "out" / "final"
    assert result.steps == 4
    assert result.trainable_parameters > 0
    model, tokenizer = load_checkpoint(merge_adapter(result.directory, tmp_path / "merged"))
    answers = list(answer(model, tokenizer, ["Say the number 11.", "Say a number."], max_new_tokens=5))
    assert len(answers) == 2


@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_optimizers_of_bitsandbytes(tiny_checkpoint, tmp_path, optimizer):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    result = train(
        Recipe.from_file(write_recipe(tmp_path, tiny_checkpoint, training__optim=optimizer, training__max_steps=12))
    )
    found = [entry["loss"] for entry in result.history if "loss" in entry]
    assert found[-1] < found[0] - 0.5


def test_an_encoded_base_is_read_through_once_before_it_is_loaded(tiny_checkpoint, tmp_path, monkeypatch):
    import arctic_plugins_huggingface.files.check as checkpoints
    from arctic_plugins_huggingface import save_checkpoint

    stack = Stack.from_dict({"fp8": {}})
    encoded, checked = save_checkpoint(*load_model(tiny_checkpoint, stack), tmp_path / "encoded", stack), []
    monkeypatch.setattr(checkpoints, "check_files", checked.append)
    train(Recipe.from_file(write_recipe(tmp_path, encoded, plugins={"lora": {"r": 4}}, training__max_steps=1)))
    assert checked == [encoded]


def test_batched_answers_equal_single_ones(tiny_checkpoint):
    model, tokenizer = load_model(tiny_checkpoint)
    questions = ["short", "a rather longer question than the first one", "x"]
    batched = list(answer(model, tokenizer, questions, max_new_tokens=8, batch_size=3))
    assert batched == [next(iter(answer(model, tokenizer, [question], max_new_tokens=8))) for question in questions]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"modle": "x"}, ConfigError, "modle is not an option; did you mean 'model'"),
        ({"data__path": "nowhere.json"}, DataError, r"data\.path .*nowhere\.json does not exist"),
        ({"data__format": "alpca"}, ConfigError, r"data\.format is 'alpca'; expected 'alpaca'"),
        ({"training__packing": True}, ConfigError, r"training\.packing is set; expected data\.packing instead"),
        (
            {"training__learning_rat": 1},
            ConfigError,
            r"training\.learning_rat is not a training argument; did you mean 'learning_rate'",
        ),
        ({"training__lr_scheduler_type": "zigzag"}, ConfigError, "training is not valid: .*zigzag"),
        ({"training": {}}, ConfigError, r"training\.output_dir is missing"),
        ({"plugins": {"fp9": {}}}, PluginNotFoundError, "did you mean 'fp8'"),
    ],
)
def test_bad_recipes_are_one_line_before_a_model_is_loaded(
    tiny_checkpoint, tmp_path, monkeypatch, changes, error, message
):
    monkeypatch.setattr("arctic_plugins_huggingface.training.run.load_model", None)
    with pytest.raises(error, match=message) as raised:
        train(Recipe.from_file(write_recipe(tmp_path, tiny_checkpoint, **changes)))
    assert "\n" not in str(raised.value)


def test_a_run_reads_each_thing_once(tiny_checkpoint, tmp_path, monkeypatch):
    read = Counter()

    def counted(owner, name, what):
        stock = getattr(owner, name)

        def count(*args, **kwargs):
            read[what] += 1
            return stock(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)

    counted(AutoConfig, "from_pretrained", "config")
    counted(AutoTokenizer, "from_pretrained", "tokenizer")
    counted(SFTConfig, "__post_init__", "arguments")
    for module in ("training.check", "loading.plan"):
        counted(importlib.import_module(f"arctic_plugins_huggingface.{module}"), "check_checkpoint", "checkpoint")
    train(Recipe.from_file(write_recipe(tmp_path, tiny_checkpoint)))
    assert read == {"config": 1, "tokenizer": 1, "arguments": 1, "checkpoint": 1}


def test_a_plan_says_what_will_be_and_is_loaded_as_it_says(tiny_checkpoint):
    plan = plan_model(tiny_checkpoint, Stack.from_dict({"fp8": {}}), dtype="float32")
    assert {codec.type for codec in plan.weights.codecs.values()} == {"fp8"}
    assert (plan.dtype, plan.changes, plan.encoded) == (torch.float32, {}, False)
    model, tokenizer = load_model(plan)
    assert tokenizer is plan.tokenizer
    assert {name for name, _ in model.named_modules() if name in plan.weights.codecs} == plan.weights.codecs.keys()
    assert all(isinstance(model.get_submodule(name), FrozenLinear) for name in plan.weights.codecs)
    with pytest.raises(TypeError, match="pass stack, dtype and further arguments to plan_model"):
        load_model(plan, dtype="bfloat16")


def test_an_output_that_exists_is_not_overwritten(tiny_checkpoint, tmp_path):
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "out" / "precious").write_text("mine")
    recipe = Recipe.from_file(write_recipe(tmp_path, tiny_checkpoint))
    with pytest.raises(
        ConfigError,
        match="exists and is not empty; expected a new directory; --resume continues .* --overwrite removes",
    ):
        train(recipe)
    assert train(recipe, overwrite=True).steps == 4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"precious", "final"}
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_leaving_out_logits_that_no_completion_needs_changes_no_loss(tiny_checkpoint):
    from arctic_plugins_huggingface.training.run import _only_completions

    model, _ = load_model(tiny_checkpoint)
    ids = torch.randint(10, 250, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, first in enumerate((9, 7, 15)):
        labels[row, :first] = -100
    inputs = {"input_ids": ids, "labels": labels}
    less = _only_completions(inputs)
    assert less["logits_to_keep"] == 20 - 6
    torch.testing.assert_close(model(**less).loss, model(**inputs).loss)
    assert model(**less).logits.shape[1] == 14
    nothing = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    assert _only_completions(nothing) == nothing


def newest(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def test_a_run_that_diverges_stops_before_it_spoils_its_weights(tiny_checkpoint, tmp_path):
    path = write_recipe(
        tmp_path, tiny_checkpoint, training__learning_rate=1e30, training__save_strategy="steps", training__save_steps=1
    )
    with pytest.raises(
        Diverged,
        match=r"the loss of step 2 is not finite; .*; the newest checkpoint is .*checkpoint-1; "
        r"lower training.learning_rate",
    ):
        train(Recipe.from_file(path))
    assert {"checkpoint-1"} == {name for name in newest(tmp_path) if name not in ("README.md",)}
    saved = load_file(tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_that_is_not_finite_is_not_used(tiny_checkpoint, rows, tmp_path, accumulate):
    args = ArcticTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        save_strategy="no",
        plugins=PLUGINS,
        gradient_accumulation_steps=accumulate,
        **QUICK,
    )
    stack = Stack.from_dict(PLUGINS)
    model, _ = load_model(tiny_checkpoint, stack)
    trainer = attach(Trainer(model=model, args=args, train_dataset=rows), stack)
    weight = next(parameter for name, parameter in model.named_parameters() if "lora_B" in name)
    weight.register_hook(lambda grad: grad * torch.nan if trainer.state.global_step == 2 else grad)
    with pytest.raises(Diverged, match=r"the gradient of step 3 is not finite; .*; no checkpoint was saved"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_step_that_is_not_finite_can_be_left_out(tiny_checkpoint, rows, tmp_path, caplog):
    stack = Stack.from_dict(PLUGINS)

    def run(spoilt, name):
        args = ArcticTrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=14,
            save_strategy="no",
            weight_decay=0.1,
            plugins=PLUGINS,
            **QUICK,
        )
        torch.manual_seed(0)
        model, _ = load_model(tiny_checkpoint, stack)
        trainer = attach(Trainer(model=model, args=args, train_dataset=rows), stack, skip_nonfinite=True)
        weight = next(parameter for name, parameter in model.named_parameters() if "lora_B" in name)
        weight.register_hook(lambda grad: grad * torch.nan if trainer.state.global_step in spoilt else grad)
        weights = []
        trainer.add_callback(Recorder(weights, weight))
        trainer.train()
        return weights

    weights = run({2, 3}, "out")
    assert not torch.equal(weights[1], weights[0])
    assert torch.equal(weights[2], weights[1])  # neither a step nor a decay
    assert torch.equal(weights[3], weights[1])
    assert not torch.equal(weights[4], weights[3])
    assert all(weight.isfinite().all() for weight in weights)
    assert "the gradient of step 3 is not finite: the step is skipped" in caplog.text
    with pytest.raises(Diverged, match="the gradient of step 13 is not finite, as in the 10 steps before it"):
        run(set(range(2, 14)), "other")


class Recorder(TrainerCallback):
    """A copy of a weight after each step."""

    def __init__(self, copies, weight):
        self.copies, self.weight = copies, weight

    def on_step_end(self, *args, **kwargs):
        self.copies.append(self.weight.detach().clone())


def test_weights_that_are_not_finite_are_not_saved(tiny_checkpoint, tmp_path, monkeypatch):
    path = write_recipe(
        tmp_path, tiny_checkpoint, training__learning_rate=1e300
    )  # beyond float32, in which the step is made
    with pytest.raises(Diverged, match="of step [12] is not finite"):
        train(Recipe.from_file(path))
    assert not (tmp_path / "out" / "final").exists()


def test_rows_longer_than_the_models_positions_are_told_before_weights_are_read(tmp_path):
    model = tiny_model(tmp_path / "short", "llama", max_position_embeddings=16)
    path = write_recipe(tmp_path, model)
    with pytest.raises(
        DataError,
        match=r"has \d+ tokens, but the model has 16 positions; expected "
        r"data\.max_length of at most 16; .*plugin 'rope'",
    ):
        prepare(Recipe.from_file(path))
    recipe = Recipe.from_file(path)
    longer = recipe.model_copy(update={"plugins": {**recipe.plugins, "rope": {"type": "linear", "factor": 8.0}}})
    assert prepare(longer).data.counts.rows
    cut = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 16, "loss": "all"})})
    assert prepare(cut).data.counts.truncated


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ({"fp8": {"include": ["**.nothing"]}, "lora": {}}, "plugins.fp8.include '.*nothing' matches no linear module"),
        ({"moe": {"expert_parallel": 2}, "lora": {}}, "plugins.moe.expert_parallel is 2 with 1 process"),
    ],
)
def test_what_plugins_refuse_is_told_before_data_are_read(tiny_checkpoint, tmp_path, monkeypatch, plugins, message):
    monkeypatch.setattr(
        "arctic_plugins_huggingface.training.preparation.load_data", lambda *_, **__: pytest.fail("data were read")
    )
    with pytest.raises(ArcticError, match=message):
        prepare(Recipe.from_file(write_recipe(tmp_path, tiny_checkpoint, plugins=plugins)))
