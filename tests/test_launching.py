"""``arctic train --nproc``: real processes that agree with one, that say who failed first, and of which none stays
behind.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from arctic_plugins_huggingface import last_checkpoint

from arctic_plugins.provenance import FILE_NAME
from arctic_plugins.testing import run_python, trainers

ARCTIC = ["-m", "arctic_plugins.cli", "train"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(tiny_checkpoint, tmp_path):
    """A function that writes a recipe and gives its path."""
    (tmp_path / "data.jsonl").write_text(
        "\n".join(json.dumps({"instruction": f"Say {n}.", "output": str(n)}) for n in range(64))
    )

    def write(name, *, plugins=None, **training):
        plugins = {"fp8": {"group_size": 64}, "lora": {"r": 4, "alpha": 8}, "shard": {}} if plugins is None else plugins
        training = {
            "max_steps": 6,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "bf16": False,
            "seed": 1,
            **training,
        }
        training = {"output_dir": str(tmp_path / name), "per_device_train_batch_size": 2, **training}
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            json.dumps(
                {
                    "model": str(tiny_checkpoint),
                    "plugins": plugins,
                    "data": {"path": "data.jsonl", "max_length": 64},
                    "training": training,
                }
            )
        )
        return path

    return write


def launched(*arguments, status=0):
    """``arctic train`` as a user types it: with --nproc it starts its processes itself."""
    return run_python(*ARCTIC, *arguments, timeout=900, environment=ENVIRONMENT, status=status)


def arctic(*arguments, processes=1, status=0):
    """``arctic train`` in forks, with what ``torchrun`` sets for each of several processes."""
    return trainers().arctic(
        "train", *arguments, processes=processes, timeout=900, environment=ENVIRONMENT, status=status
    )


def losses(done):
    return [float(found) for found in re.findall(r"loss (\d+\.\d+) ·", done.stdout)]


def resume_at_4(source, target):
    """A copy of a run that was cut off after step 4."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "final")
    shutil.rmtree(target / "checkpoint-6")


def processes(recipe):
    return [
        line
        for line in subprocess.run(
            ["pgrep", "-f", str(recipe)], capture_output=True, text=True, check=False
        ).stdout.split()
        if line
    ]


def test_two_processes_train_like_one_and_resume_as_one_or_four(recipe, tmp_path):
    plain = {"fp8": {"group_size": 64}, "lora": {"r": 4, "alpha": 8}}
    one = losses(arctic(recipe("one", plugins=plain, per_device_train_batch_size=4)))
    done = launched(recipe("two"), "--nproc", 2)
    assert len(one) == 6
    assert losses(done) == pytest.approx(one, rel=1e-4)
    assert done.stdout.count("step 6/6") == 1, "one progress bar"
    for name, count, batch in (("again", 2, 2), ("alone", 1, 4), ("four", 4, 1)):
        resume_at_4(tmp_path / "two", tmp_path / name)
        done = arctic(recipe(name, per_device_train_batch_size=batch), "--resume", processes=count)
        assert losses(done) == pytest.approx(one[4:], rel=1e-4), name
        assert "resuming from" in done.stdout
        assert (f"processes {count} (was 2)" in done.stdout) == (count != 2), name
    assert not (tmp_path / "two" / "final" / "recipe.json").exists()


def test_bad_input_is_one_line_from_all(recipe):
    done = launched(recipe("bad", plugins={"fp8": {"bit": 8}, "lora": {}}), "--nproc", 2, status=2)
    assert done.stderr.count("arctic: plugins.fp8.bit is not an option") == 1


def test_a_dry_run_shows_what_each_process_keeps(recipe):
    plan = json.loads(arctic(recipe("dry"), "--nproc", 2, "--dry-run", "--json").stdout)
    placed = [module for module in plan["modules"] if module["codec"]]
    assert {module["placement"] for module in placed} == {"1/2 in each process"}
    assert all(
        module["nbytes"] <= 2 * module["resident_nbytes"] <= module["nbytes"] + 64 * module["count"]
        for module in placed
    )


def test_a_dry_run_counts_processes_that_share_texts_as_one(recipe):
    path = recipe("dry", plugins={"lora": {}, "longseq": {"sequence_parallel": 2}}, max_steps=-1, num_train_epochs=1)
    assert json.loads(arctic(path, "--nproc", 2, "--dry-run", "--json").stdout)["steps"] == 64 // 2


@pytest.mark.parametrize("how", ["process", "launcher", "terminated"])
def test_whoever_is_killed_nobody_stays_behind_and_the_run_resumes(recipe, tmp_path, how):
    path = recipe("run", max_steps=2000, save_steps=5, lr_scheduler_type="constant")
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [sys.executable, *ARCTIC, str(path), "--nproc", "2"], stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT
        )
    limit = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoint-5" / FILE_NAME).is_file():
        assert launcher.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < limit
        time.sleep(0.1)
    if how == "process":
        workers = [int(pid) for pid in processes(path) if int(pid) != launcher.pid]
        second = next(pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(second, signal.SIGKILL)
    else:
        launcher.send_signal(signal.SIGKILL if how == "launcher" else signal.SIGTERM)
    status = launcher.wait(timeout=120)
    while processes(path):
        assert time.monotonic() < limit, "orphans"
        time.sleep(0.1)
    text = (tmp_path / "log").read_text()
    if how == "process":
        assert status == 1
        assert "rank 1: ended by SIGKILL" in text
        assert (
            text.index("rank 1: ended by SIGKILL") < text.find("arctic: RuntimeError")
            or "arctic: RuntimeError" not in text
        )
    elif how == "terminated":
        assert status == 130
        assert "'arctic train RECIPE --resume' continues" in text
    newest = max(
        int(found.name.rpartition("-")[2])
        for found in (tmp_path / "run").glob("checkpoint-*")
        if (found / FILE_NAME).is_file()
    )
    done = arctic(
        recipe("run", max_steps=newest + 2, save_steps=5, lr_scheduler_type="constant"), "--resume", processes=2
    )
    assert f"checkpoint-{newest}" in "".join(done.stdout.splitlines())  # folded, where the path is long
    assert len(losses(done)) == 2


def test_two_nodes(recipe, tmp_path):
    """Two agents of torchrun on one machine, each with one process and a rank of its own."""
    path = recipe("nodes")
    one = losses(
        arctic(
            recipe(
                "one", plugins={"fp8": {"group_size": 64}, "lora": {"r": 4, "alpha": 8}}, per_device_train_batch_size=4
            )
        )
    )
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        "localhost",
    ]
    port = str(20000 + os.getpid() % 20000)
    runs = [
        subprocess.Popen(
            [
                *launcher,
                "--master_port",
                port,
                "--node_rank",
                str(rank),
                "-m",
                "arctic_plugins.cli",
                "train",
                str(path),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        for rank in range(2)
    ]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    found = [float(loss) for loss in re.findall(r"loss (\d+\.\d+) ·", "".join(out for out, _ in outputs))]
    assert found == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["nproc", "hostfile"])
def test_deepspeed_zero_2_over_shards(recipe, tmp_path, launcher, monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    shutil.copy(ROOT / "examples" / "zero2.json", tmp_path)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(
        "#!/bin/sh\nexec hostname\n"
    )  # by which DeepSpeed's launcher asks whether the host is there
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    how = ("--nproc", 2) if launcher == "nproc" else ("--hostfile", tmp_path / "hosts")
    one = losses(
        arctic(
            recipe(
                "one", plugins={"fp8": {"group_size": 64}, "lora": {"r": 4, "alpha": 8}}, per_device_train_batch_size=4
            )
        )
    )
    assert losses(launched(recipe("two", deepspeed="zero2.json"), *how)) == pytest.approx(one, rel=1e-3)
    if launcher == "nproc":
        shared = {"fp8": {"group_size": 64}, "lora": {"r": 4, "alpha": 8}, "longseq": {"sequence_parallel": 2}}
        whole = recipe("shared", deepspeed="zero2.json", plugins=shared, per_device_train_batch_size=4, bf16=True)
        assert losses(arctic(whole, processes=2)) == pytest.approx(one, rel=0.02), (
            "resident weights, and processes that share texts"
        )
        resume_at_4(tmp_path / "two", tmp_path / "again")
        refused = arctic(recipe("again", deepspeed="zero2.json"), "--nproc", 1, "--resume", status=2)
        assert "was made by 2 processes, but this run has 1" in refused.stderr
        assert "was made with DeepSpeed" in arctic(recipe("again"), "--resume", processes=2, status=2).stderr
        assert losses(arctic(recipe("again", deepspeed="zero2.json"), "--resume", processes=2)) == pytest.approx(
            one[4:], rel=1e-3
        )


def test_a_process_that_hangs_ends_the_run_in_time(recipe, tmp_path):
    """Also with ``use_cpu``, with which transformers 5.19 by itself would wait for half an hour."""
    path = recipe(
        "hung",
        plugins={"lora": {"r": 4}},
        max_steps=100_000,
        save_steps=2,
        save_total_limit=1,
        ddp_timeout=20,
        use_cpu=True,
    )
    run = trainers().start(["-m", "arctic_plugins.cli", "train", path], processes=2, environment=ENVIRONMENT)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "hung").glob(f"checkpoint-*/{FILE_NAME}")):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(run.pids[1], signal.SIGSTOP)
    _, error = run.communicate(timeout=300)
    assert run.returncode == 1
    assert (
        "another process of this run did not answer for 20 s (training.ddp_timeout); check its output; 'arctic "
        "train RECIPE --resume'" in error
    )
    assert last_checkpoint(tmp_path / "hung")[0] is not None
