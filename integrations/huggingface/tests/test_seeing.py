"""What a user sees of a run: before it (--dry-run), while it lasts, and after it."""

import json
import re

import pytest
from arctic_plugins_huggingface.loading.load import load_model
from arctic_plugins_huggingface.training.arguments import training_arguments
from arctic_plugins_huggingface.training.dry_run import make_plan
from arctic_plugins_huggingface.training.preparation import prepare
from arctic_plugins_huggingface.training.recipe import Recipe
from arctic_plugins_huggingface.training.run import train
from rich.console import Console
from transformers import AutoModelForCausalLM

from arctic_plugins import Stack
from arctic_plugins.cli import main


@pytest.fixture
def recipe(tiny_checkpoint, tmp_path):
    records = [{"instruction": f"Say {number}.", "output": str(number) * (number % 5 + 1)} for number in range(37)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))

    def write(*, data=None, plugins=None, **training):
        base = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 3,
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
        }
        content = {
            "model": str(tiny_checkpoint),
            "plugins": {"fp8": {"include": ["**.mlp.*"]}, "lora": {"r": 4}} if plugins is None else plugins,
            "data": {"path": "data.jsonl", "max_length": 64, **(data or {})},
            "training": {**base, **training},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(content))
        return path

    return write


def dry_run(capsys, path, *options):
    with pytest.raises(SystemExit) as ended:
        main(["train", str(path), "--dry-run", *options])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_a_dry_run_shows_the_stack_and_every_module_and_touches_nothing(recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read")
    )
    path = recipe(max_steps=7)
    before = sorted(tmp_path.rglob("*"))
    text = dry_run(capsys, path)
    assert sorted(tmp_path.rglob("*")) == before
    assert re.search(r"fp8 +include +\('\*\*\.mlp\.\*',\) +recipe", text)
    assert re.search(r"lora +alpha +16 +default", text)
    plain, _, encoded = text.partition("\nplain")[2].partition("\nfp8 (bits 8, group_size channel)")
    assert re.search(r"mlp\.up_proj +0-1 +176 x 64 +960 each", encoded)
    assert re.search(r"self_attn\.q_proj +0-1 +128 x 64 +768 each", plain)
    assert re.search(r"lm_head +272 x 64 ", plain)
    assert "37 rows" in text
    assert re.search(r"steps +7 over 37 rows", text)


@pytest.mark.parametrize(
    ("data", "training"),
    [
        ({}, {"num_train_epochs": 2}),
        ({}, {"num_train_epochs": 1.5, "gradient_accumulation_steps": 4}),
        ({"packing": True}, {"num_train_epochs": 2}),
        ({"eval_size": 5, "max_length": 16}, {"num_train_epochs": 1, "dataloader_drop_last": True}),
    ],
    ids=["epochs", "accumulation", "packing", "cut"],
)
def test_what_a_dry_run_counts_is_what_happens(recipe, tiny_checkpoint, data, training):
    parsed = Recipe.from_file(recipe(data=data, **training))
    plan = make_plan(prepare(parsed))
    result = train(parsed)
    assert plan.steps == result.steps
    assert plan.trainable_parameters == result.trainable_parameters
    assert plan.data == str(result.counts)
    model, _ = load_model(tiny_checkpoint, Stack.from_dict(parsed.plugins).without("adapter"))
    assert plan.bytes["base"] == sum(parameter.nbytes for parameter in model.parameters())
    assert plan.bytes["trainable"] * 2 == plan.bytes["optimizer"] == 8 * plan.trainable_parameters


@pytest.mark.parametrize("options", [{"type": "nf4"}, {"type": "int8"}], ids=lambda options: options["type"])
def test_a_dry_run_with_another_codec(recipe, tiny_checkpoint, capsys, monkeypatch, options):
    monkeypatch.setenv("COLUMNS", "200")
    path = recipe(plugins={"bnb": options, "lora": {"r": 4}}, max_steps=7)
    encoded, _, plain = dry_run(capsys, path).partition(f"\nbnb {options['type']}")[2].partition("\nplain")
    assert re.search(r"mlp\.up_proj +0-1 +176 x 64 ", encoded)
    assert "lm_head" in plain
    model, _ = load_model(tiny_checkpoint, Stack.from_dict({"bnb": options}))
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert make_plan(prepare(Recipe.from_file(path))).bytes["base"] == parameters


def test_a_dry_run_of_an_encoded_checkpoint_and_of_a_stream(recipe, tiny_checkpoint, tmp_path, capsys):
    from arctic_plugins_huggingface import save_checkpoint

    stack = Stack.from_dict({"fp8": {"group_size": 64}})
    encoded = save_checkpoint(*load_model(tiny_checkpoint, stack), tmp_path / "encoded", stack)
    path = recipe(plugins={"lora": {"r": 4}}, data={"streaming": True}, max_steps=9)
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": str(encoded)}))
    plan = json.loads(dry_run(capsys, path, "--json"))
    assert plan["steps"] == 9
    assert plan["rows"] == 0
    assert {module["codec"] for module in plan["modules"]} == {"fp8 (bits 8, group_size 64)", None}
    assert plan["bytes"]["base"] == sum(parameter.nbytes for parameter in load_model(encoded)[0].parameters())


def test_lines_without_a_terminal_and_a_summary(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main(
            ["train", str(recipe(max_steps=4, logging_steps=2, data={"max_length": 16, "eval_size": 4}, eval_steps=2))]
        )
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    assert re.search(
        r"^data: 37 rows, [\d,]+ tokens; \d+ of them truncated, .*; 4 rows to evaluate on$", out, re.MULTILINE
    )
    assert re.search(r"step 2/4 · loss \d+\.\d{4} · [\d,]+ tokens/s · \d+\.\d\d GB · \d+ s left", out)
    assert re.search(r"step 4/4 · eval loss \d+\.\d{4}", out)
    summary = out.partition("summary")[2]
    for name in ("steps", "loss", "eval loss", "tokens", "data", "trainable parameters", "peak memory", "saved in"):
        assert name in summary
    assert re.search(r"37 rows.*of them truncated", " ".join(summary.split()))
    assert "{'loss'" not in out, "the Trainer's own printing is off"


def test_a_bar_on_a_terminal(recipe):
    console = Console(force_terminal=True, record=True, width=160)
    result = train(Recipe.from_file(recipe(max_steps=4, logging_steps=1)), console=console)
    text = console.export_text()
    last = [entry["loss"] for entry in result.history if "loss" in entry][-1]
    assert re.search(rf"training .* 4/4 loss {last:.4f} · [\d,]+ tokens/s · \d+\.\d\d GB", text)
    assert "left" in text


def test_tokens_are_those_without_padding(recipe):
    result = train(Recipe.from_file(recipe(num_train_epochs=1)))
    assert result.tokens == result.counts.tokens


def test_tensorboard_gets_what_the_trainer_gives_it(recipe, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    result = train(Recipe.from_file(recipe(max_steps=3, logging_steps=1, report_to="tensorboard")))
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx([entry["loss"] for entry in result.history if "loss" in entry])


def test_report_to_is_the_users(recipe, monkeypatch):
    assert training_arguments(Recipe.from_file(recipe())).report_to == []
    monkeypatch.setattr(
        "arctic_plugins_huggingface.training.arguments.get_available_reporting_integrations", lambda: ["wandb"]
    )
    assert training_arguments(Recipe.from_file(recipe(report_to="wandb"))).report_to == ["wandb"]
    assert training_arguments(Recipe.from_file(recipe(learning_rate="1e-3"))).learning_rate == 1e-3, (
        "YAML reads 1e-3 as a text"
    )
