"""Several real processes over gloo agree with one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from arctic_plugins.provenance import FILE_NAME

PLUGINS = {"fp8": {"group_size": 64}, "lora": {"r": 4, "alpha": 8}}


def train(processes, checkpoint, directory, *, batch, checkpointing):
    arguments = [
        str(Path(__file__).with_name("train_script.py")),
        str(checkpoint),
        str(directory / "losses.json"),
        *("--output_dir", str(directory), "--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--plugins", json.dumps(PLUGINS)),
        *("--max_steps", "4", "--save_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-2", "--per_device_train_batch_size", str(batch)),
        *("--gradient_checkpointing", str(checkpointing), "--train_sampling_strategy", "sequential"),
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    directory.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (directory / "checkpoint-4" / FILE_NAME).is_file()
    return json.loads((directory / "losses.json").read_text()), load_file(directory / "checkpoint-4" / "adapter_model.safetensors")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_processes_train_like_one(tiny_checkpoint, tmp_path, checkpointing):
    one, adapter_of_one = train(1, tiny_checkpoint, tmp_path / "one", batch=4, checkpointing=checkpointing)
    two, adapter_of_two = train(2, tiny_checkpoint, tmp_path / "two", batch=2, checkpointing=checkpointing)
    assert one == pytest.approx(two, rel=1e-4)
    assert one[0] - one[-1] > 0.5
    for name, tensor in adapter_of_one.items():
        difference = (tensor - adapter_of_two[name]).abs().max()
        assert difference <= 2e-3, f"{name} differs by {difference}"  # Adam turns rounding in a tiny gradient into a step of its own size
