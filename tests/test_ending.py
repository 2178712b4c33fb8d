"""A process of a distributed run ends with its status, and with nothing lost."""

import json
import time
from pathlib import Path

import pytest

from arctic_plugins.ending import LOST, PATIENCE
from arctic_plugins.testing import run_python

SCRIPT = Path(__file__).with_name("ending_script.py")


def test_an_end_right_after_a_collective_is_no_abort(tmp_path):
    """With ``exit`` for ``leave``, one process in five dies of SIGABRT."""
    done = run_python(SCRIPT, 15, "leave", tmp_path, timeout=600)
    assert json.loads(done.stdout) == {"0": 30}, done.stderr[-3000:]


def test_who_leaves_does_not_wait_for_the_dead(tmp_path):
    started = time.monotonic()
    done = run_python(SCRIPT, 2, "alone", tmp_path, timeout=600)
    assert json.loads(done.stdout) == {"0": 2, "7": 2}, done.stderr[-3000:]
    assert time.monotonic() - started < 2 * PATIENCE.total_seconds()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_is_lost_is_no_success(monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with open("/dev/full", "w") as full:
        run_python("-c", "from arctic_plugins.ending import leave; print('said'); leave()", stdout=full, status=LOST)


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
    done = run_python("-c", LEAVE, status=3)
    assert (done.stdout, done.stderr) == ("said joined\nregistered\n", "and here")
