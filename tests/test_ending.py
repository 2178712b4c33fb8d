"""A process of a distributed run ends with its status, and with nothing lost."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arctic_plugins.ending import LOST, PATIENCE

SCRIPT = Path(__file__).with_name("ending_script.py")


def test_an_end_right_after_a_collective_is_no_abort(tmp_path):
    """With ``exit`` for ``leave``, one process in five dies of SIGABRT."""
    command = [sys.executable, str(SCRIPT), "15", "leave", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert json.loads(done.stdout) == {"0": 30}, done.stderr[-3000:]


def test_who_leaves_does_not_wait_for_the_dead(tmp_path):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "2", "alone", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert json.loads(done.stdout) == {"0": 2, "7": 2}, done.stderr[-3000:]
    assert time.monotonic() - started < 2 * PATIENCE.total_seconds()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_is_lost_is_no_success():
    with open("/dev/full", "w") as full:
        code = "from arctic_plugins.ending import leave; print('said'); leave()"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        assert (
            subprocess.run(
                [sys.executable, "-c", code], stdout=full, env=environment, check=False, timeout=120
            ).returncode
            == LOST
        )


LEAVE = """
import atexit, sys, threading, time
from arctic_plugins.ending import leave
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.2), print("joined"))).start()
print("said", end=" ")
sys.stderr.write("and here")
leave(3)
"""


def test_threads_are_joined_functions_run_and_streams_flushed():
    done = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said joined\nregistered\n", "and here")
