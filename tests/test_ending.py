"""A process of a distributed run ends with its status, and with nothing lost."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("ending_script.py")


def test_an_end_right_after_a_collective_is_no_abort(tmp_path):
    """With ``exit`` for ``leave``, one process in five dies of SIGABRT."""
    command = [sys.executable, str(SCRIPT), "15", "leave", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert json.loads(done.stdout) == {"0": 30}, done.stderr[-3000:]


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
