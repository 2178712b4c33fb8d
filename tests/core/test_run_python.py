"""A new interpreter, and what a test that fails shows of it."""

import json
import subprocess

import pytest

from arctic_plugins.testing import run_python, said


def test_arguments_environment_and_outputs(tmp_path):
    code = "import os, sys; print(sys.argv[1:], os.environ['WORD'], os.getcwd()); print('aside', file=sys.stderr)"
    done = run_python("-c", code, tmp_path, 2, {"a": None}, environment={"WORD": "yes"}, cwd=tmp_path)
    assert done.stdout == f"{[str(tmp_path), '2', json.dumps({'a': None})]} yes {tmp_path}\n"
    assert done.stderr == "aside\n"


def test_what_was_said_is_read_between_other_output():
    code = "from arctic_plugins.testing import say; print('{other'); say({'found': 1}); print(2); say({'found': 2})"
    assert said(run_python("-c", code)) == [{"found": 1}, {"found": 2}]


def test_another_status_shows_the_ends_of_both_outputs():
    code = "import sys; print('x' * 10_000 + 'the output'); sys.exit('the error')"
    with pytest.raises(AssertionError, match="ended with status 1; expected 0") as raised:
        run_python("-c", code)
    text = str(raised.value)
    assert "the output\n" in text
    assert "the error\n" in text
    assert text.count("x") < 10_000
    assert run_python("-c", code, status=1).stderr == "the error\n"
    assert run_python("-c", code, status=None).returncode == 1


def test_one_that_takes_too_long_shows_what_it_said_so_far():
    code = "import time; print('so far', flush=True); time.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired) as raised:
        run_python("-c", code, timeout=2)
    assert "so far" in raised.value.__notes__[0]
