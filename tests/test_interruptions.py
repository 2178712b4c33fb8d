"""A run that is stopped, killed or crashes goes on from its newest complete checkpoint as if nothing had been."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from arctic_plugins_huggingface import last_checkpoint
from arctic_plugins_huggingface.training.recipe import Recipe
from arctic_plugins_huggingface.training.run import train
from rich.console import Console

from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.provenance import FILE_NAME
from arctic_plugins.testing import trainers

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread():
    """As many as the child processes have: sums over other partitions round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(tiny_checkpoint, tmp_path):
    """A function that writes a recipe; dropout makes it depend on every random state there is."""
    records = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))

    def write(name, *, data=None, **training):
        settings = {
            "max_steps": 12,
            "save_steps": 1,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "bf16": False,
        }
        content = {
            "model": str(tiny_checkpoint),
            "plugins": {"fp8": {}, "lora": {"r": 4, "dropout": 0.2}},
            "data": {"path": "data.jsonl", "eval_size": 4, **(data or {})},
            "training": {
                "output_dir": str(tmp_path / name),
                "per_device_train_batch_size": 4,
                "use_cpu": True,
                **settings,
                **training,
            },
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(content))
        return path

    return write


def losses(output):
    """(step, loss and gradient norm) of everything that the run's newest checkpoint has logged."""
    newest, _ = last_checkpoint(output)
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry.get("loss"), entry.get("grad_norm"), entry.get("eval_loss")) for entry in history]


def wait_for(path, process):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "data"),
    [
        (signal.SIGINT, {}),
        (signal.SIGTERM, {}),
        (signal.SIGINT, {"streaming": True}),
        (signal.SIGINT, {"packing": True, "max_length": 64}),
    ],
    ids=["SIGINT", "SIGTERM", "stream", "packed"],
)
def test_a_signal_stops_with_a_checkpoint_and_resuming_gives_exactly_the_same_losses(recipe, tmp_path, number, data):
    train(Recipe.from_file(recipe("whole", data=data, save_steps=12)))
    stopped = recipe("stopped", data=data, save_strategy="no", max_steps=12, report_to="none")
    begun = tmp_path / "begun"
    code = (
        "import sys; import arctic_plugins_huggingface.training.run as sft; "
        "from pathlib import Path; from transformers "
        "import TrainerCallback\n"
        "class Begun(TrainerCallback):\n"
        "    def on_step_begin(self, args, state, control, **kwargs): state.global_step == 4 and "
        f"Path({str(begun)!r}).touch()\n"
        "run = sft.train; sft.train = lambda *a, **k: run(*a, callbacks=[Begun()], **k)\n"
        "from arctic_plugins.cli import main; main(sys.argv[1:])"
    )
    process = trainers().start(["-c", code, "train", stopped], environment=ENVIRONMENT)
    wait_for(begun, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    newest, ignored = last_checkpoint(tmp_path / "stopped")
    assert not ignored
    assert f"saved in {newest}; 'arctic train RECIPE --resume' continues" in error
    assert 5 <= int(newest.name.split("-")[1]) < 12
    assert not (tmp_path / "stopped" / "final").exists()
    rewritten = recipe("stopped", data=data, save_steps=12)
    train(Recipe.from_file(rewritten), resume=True)
    assert [row for row in losses(tmp_path / "stopped") if row[1]] == [
        row for row in losses(tmp_path / "whole") if row[1]
    ]
    assert (tmp_path / "stopped" / "final" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole" / "final" / "adapter_model.safetensors"
    ).read_bytes()


def test_killed_twenty_times_at_random_it_loses_at_most_the_step_in_progress(recipe, tmp_path):
    killed = recipe("killed", max_steps=100_000, save_total_limit=2, lr_scheduler_type="constant")
    done = trainers().run(
        [Path(__file__).with_name("kill_script.py"), killed, tmp_path / "killed", 20],
        timeout=900,
        environment=ENVIRONMENT,
    )
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == 20, done.stderr[-3000:]
    for kill in kills:
        assert kill["committed"] >= kill["begun"] - 1, kills
    last = kills[-1]["committed"]
    assert last >= 20, "it got on between the kills"
    assert any(kill["ignored"] for kill in kills), "no kill fell into a save"
    train(Recipe.from_file(recipe("killed", max_steps=last + 2, lr_scheduler_type="constant")), resume=True)
    train(Recipe.from_file(recipe("whole", max_steps=last + 2, lr_scheduler_type="constant", save_steps=last + 2)))
    # An evaluation between two saves is not made up for; every training step is.
    assert [row for row in losses(tmp_path / "killed") if row[1]] == [
        row for row in losses(tmp_path / "whole") if row[1]
    ]


def test_what_was_not_committed_is_passed_over_and_named(recipe, tmp_path):
    path = recipe("run", max_steps=3)
    train(Recipe.from_file(path))
    output = tmp_path / "run"
    expected = losses(output)
    shutil.rmtree(output / "final")
    (output / "checkpoint-3" / FILE_NAME).unlink()
    damaged = output / "checkpoint-2" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    console = Console(record=True, width=400)
    train(Recipe.from_file(path), resume=True, console=console)
    text = console.export_text()
    assert f"ignored: {output}/checkpoint-3 is not complete: {output}/checkpoint-3 has no {FILE_NAME}" in text
    assert f"ignored: {output}/checkpoint-2 is not complete: {damaged} has" in text
    assert f"resuming from {output}/checkpoint-1" in text
    assert losses(output) == expected
    assert train(Recipe.from_file(path), resume=True) is None, "final is complete"


def test_the_older_checkpoint_stays_until_the_newer_is_complete(recipe, tmp_path, monkeypatch):
    def crash(directory, stack, **more):
        if directory.name == "checkpoint-3":
            raise OSError("the power went")
        return write(directory, stack, **more)

    import arctic_plugins_huggingface.training.trainer as training

    write = training.write_provenance
    monkeypatch.setattr(training, "write_provenance", crash)
    with pytest.raises(OSError, match="the power went"):
        train(Recipe.from_file(recipe("run", save_total_limit=1)))
    assert last_checkpoint(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-2"
    monkeypatch.undo()
    train(Recipe.from_file(recipe("run", save_total_limit=1)), resume=True)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-12"}


def test_an_incomplete_checkpoint_of_a_higher_step_is_not_kept_in_place_of_a_complete_one(recipe, tmp_path):
    train(Recipe.from_file(recipe("run", max_steps=2, lr_scheduler_type="constant")))
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-9")
    (tmp_path / "run" / "checkpoint-9" / FILE_NAME).unlink()
    train(Recipe.from_file(recipe("run", max_steps=4, save_total_limit=1, lr_scheduler_type="constant")), resume=True)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-9"}
    assert last_checkpoint(tmp_path / "run")[0].name == "checkpoint-4"


def test_what_cannot_be_resumed(recipe, tmp_path):
    path = recipe("run", max_steps=2, save_only_model=True)
    train(Recipe.from_file(path))
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(
        CheckpointError, match=r"has no optimizer\.pt; expected a checkpoint saved without training\.save_only_model"
    ):
        train(Recipe.from_file(path), resume=True)
    changed = json.loads(path.read_text())
    changed["plugins"]["lora"]["r"] = 8
    path.write_text(json.dumps(changed))
    with pytest.raises(
        ConfigError,
        match=r"was made with different plugins or options than the recipe's: plugins\.lora\.r was 4 and is 8; "
        r"expected the same",
    ):
        train(Recipe.from_file(path), resume=True)


@pytest.mark.parametrize(
    "training", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1}], ids=["steps", "epochs"]
)
def test_killed_while_saving_the_end_it_only_saves_the_end(recipe, tmp_path, training):
    path = recipe("run", **training)
    train(Recipe.from_file(path))
    expected, before = (tmp_path / "run" / "final" / "adapter_model.safetensors").read_bytes(), losses(tmp_path / "run")
    (tmp_path / "run" / "final").rename(tmp_path / "run" / "final.unfinished")
    train(Recipe.from_file(path), resume=True)
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").read_bytes() == expected
    assert losses(tmp_path / "run") == before
    assert not (tmp_path / "run" / "final.unfinished").exists()


def test_nothing_to_resume_starts_from_the_beginning(recipe, tmp_path):
    console = Console(record=True, width=400)
    train(Recipe.from_file(recipe("run", max_steps=1)), resume=True, console=console)
    assert f"{tmp_path}/run has no complete checkpoint: training starts from the beginning" in console.export_text()


def test_one_signal_stops_both_of_two_processes_at_the_same_step(recipe, tmp_path):
    path = recipe("two", max_steps=100_000, save_strategy="no", logging_steps=1)
    process = trainers().start(["-m", "arctic_plugins.cli", "train", path], processes=2, environment=ENVIRONMENT)
    deadline = time.monotonic() + 300
    while "loss" not in process.texts()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pids[1], signal.SIGTERM)
    _, error = process.communicate()
    assert error.count("'arctic train RECIPE --resume' continues") == 2, error[-3000:]
    newest, ignored = last_checkpoint(tmp_path / "two")
    assert not ignored
    assert {file.name for file in newest.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
