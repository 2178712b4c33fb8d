"""Run in a process of its own: forks `arctic train --resume` again and again and kills it at random moments.

``python kill_script.py RECIPE OUTPUT_DIR KILLS``; prints a JSON line for each kill. Forking saves the imports of each
run.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import arctic_plugins_huggingface.training.run as sft
import torch
from arctic_plugins_huggingface import last_checkpoint
from transformers import TrainerCallback

from arctic_plugins.cli import main


class Started(TrainerCallback):
    """Says which step has begun, through a file of one number."""

    def __init__(self, path):
        self.path = path

    def on_step_begin(self, args, state, control, **kwargs):
        draft = self.path.with_suffix(".tmp")
        draft.write_text(str(state.global_step + 1))
        draft.replace(self.path)


def begun(path):
    return int(path.read_text()) if path.exists() else 0


def wait(path, step=1):
    deadline = time.monotonic() + 120
    while begun(path) < step:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return begun(path)


def train(recipe, started):
    run = sft.train
    sft.train = lambda parsed, **options: run(parsed, callbacks=[Started(started)], **options)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        main(["train", recipe, "--resume"])
    except SystemExit as end:
        os._exit(end.code or 0)


if __name__ == "__main__":
    recipe, output, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    choose, started = random.Random(0), output.with_suffix(".started")
    for turn in range(kills):
        before = begun(started)
        started.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            train(recipe, started)
        first, since, steps = wait(started), time.monotonic(), choose.randint(1, 3)
        step = wait(started, first + steps)
        pace = (time.monotonic() - since) / steps
        if turn % 2:  # into a save
            while not (output / f"checkpoint-{step}").is_dir():
                time.sleep(0.001)
            pace /= 4
        time.sleep(choose.uniform(0, pace))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found, ignored = last_checkpoint(output)
        committed = int(found.name.split("-")[1]) if found else 0
        print(
            json.dumps({"before": before, "begun": begun(started), "committed": committed, "ignored": len(ignored)}),
            flush=True,
        )
