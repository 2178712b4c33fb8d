"""Several real processes over gloo agree with one."""

import json
from pathlib import Path

import pytest
from arctic_plugins_huggingface import last_checkpoint
from safetensors.torch import load_file

from arctic_plugins.provenance import FILE_NAME
from arctic_plugins.testing import run_python, trainers

PLUGINS = {"fp8": {"group_size": 64}, "lora": {"r": 4, "alpha": 8}}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
ACCELERATE = (
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",  # which starts torchrun; --cpu would start MPI, or one process without it
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--num_processes",
)


def start(
    processes,
    checkpoint,
    directory,
    *,
    batch,
    checkpointing=False,
    plugins=PLUGINS,
    launcher=None,
    kill=None,
    spoil=None,
    status=0,
):
    arguments = [
        str(Path(__file__).with_name("train_script.py")),
        str(checkpoint),
        str(directory / "losses.json"),
        *(
            "--output_dir",
            str(directory),
            "--use_cpu",
            "--report_to",
            "none",
            "--disable_tqdm",
            "True",
            "--plugins",
            json.dumps(plugins),
        ),
        *(
            "--max_steps",
            "4",
            "--save_steps",
            "2",
            "--logging_steps",
            "1",
            "--learning_rate",
            "1e-2",
            "--per_device_train_batch_size",
            str(batch),
        ),
        *("--gradient_checkpointing", str(checkpointing), "--train_sampling_strategy", "sequential"),
    ]
    directory.mkdir(exist_ok=True)
    environment = {
        "OMP_NUM_THREADS": "1",
        **{name: json.dumps(what) for name, what in (("KILL", kill), ("SPOIL", spoil)) if what},
    }
    if launcher is None:
        return trainers().run(arguments, processes=processes, environment=environment, status=status)
    return run_python(*launcher, processes, *arguments, environment=environment, status=status)


def train(processes, checkpoint, directory, **options):
    start(processes, checkpoint, directory, **options)
    assert (directory / "checkpoint-4" / FILE_NAME).is_file()
    return json.loads((directory / "losses.json").read_text()), load_file(
        directory / "checkpoint-4" / "adapter_model.safetensors"
    )


def assert_same(one, other):
    (losses_of_one, one), (losses_of_other, other) = one, other
    assert losses_of_one == pytest.approx(losses_of_other, rel=1e-4)
    for name, tensor in one.items():
        difference = (tensor - other[name]).abs().max()
        assert difference <= 2e-3, (
            f"{name} differs by {difference}"
        )  # Adam turns rounding in a tiny gradient into a step of its own size


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_processes_train_like_one(tiny_checkpoint, tmp_path, checkpointing):
    one = train(1, tiny_checkpoint, tmp_path / "one", batch=4, checkpointing=checkpointing)
    two = train(
        2,
        tiny_checkpoint,
        tmp_path / "two",
        batch=2,
        checkpointing=checkpointing,
        launcher=TORCHRUN if checkpointing else None,
    )
    assert_same(one, two)
    assert one[0][0] - one[0][-1] > 0.5


def test_shards_of_two_and_four_processes_train_like_one(tiny_checkpoint, tmp_path):
    one = train(1, tiny_checkpoint, tmp_path / "one", batch=4)
    sharded = {**PLUGINS, "shard": {}}
    assert_same(one, train(2, tiny_checkpoint, tmp_path / "two", batch=2, plugins=sharded, launcher=ACCELERATE))
    assert_same(
        one, train(4, tiny_checkpoint, tmp_path / "four", batch=1, plugins={**PLUGINS, "shard": {"group_size": 2}})
    )
    offloaded = {**sharded, "offload": {"to": "disk", "ratio": 0.5, "path": str(tmp_path / "files")}}
    assert_same(one, train(2, tiny_checkpoint, tmp_path / "offloaded", batch=2, plugins=offloaded, checkpointing=True))


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_ranks_that_are_killed_within_a_save(tiny_checkpoint, tmp_path, ranks):
    whole = train(1, tiny_checkpoint, tmp_path / "whole", batch=4)
    options = {"batch": 2, "plugins": {**PLUGINS, "shard": {}}}
    assert start(2, tiny_checkpoint, tmp_path / "run", kill=(4, ranks), status=None, **options).returncode != 0
    newest, ignored = last_checkpoint(tmp_path / "run")
    assert newest == tmp_path / "run" / "checkpoint-2"
    assert len(ignored) == 1
    assert "checkpoint-4 is not complete" in ignored[0]
    assert_same(whole, train(2, tiny_checkpoint, tmp_path / "run", **options))


def test_all_processes_stop_where_one_diverges(tiny_checkpoint, tmp_path):
    done = start(2, tiny_checkpoint, tmp_path / "run", batch=2, spoil=(3, [1]), status=1)
    assert done.stderr.count("Diverged: the gradient of step 3 is not finite") == 2
    assert last_checkpoint(tmp_path / "run")[0] == tmp_path / "run" / "checkpoint-2"
