"""Programs in forks of one interpreter: what they get, what they answer, and how they end."""

import contextlib
import json
import os
import signal
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from arctic_plugins.testing import Forks, trainers


@pytest.fixture(scope="module")
def forks():
    with closing(Forks(["json", "there_is_no_such_module"])) as forks:
        yield forks


SAY = (
    "import json, os, sys; print(json.dumps([sys.argv, os.getcwd(), os.environ.get('WORD'), __name__, 'json' in "
    "sys.modules, sys.path[0]]))"
)


def test_it_is_as_if_the_interpreter_had_been_started(forks, tmp_path):
    (tmp_path / "script.py").write_text(SAY)
    for arguments, name, first in (
        ([tmp_path / "script.py", "1", 2], str(tmp_path / "script.py"), str(tmp_path)),
        (["-c", SAY, "1", 2], "-c", str(tmp_path)),
        (["-m", "script", "1", 2], str(tmp_path / "script.py"), str(tmp_path)),
    ):
        done = forks.run(arguments, environment={"WORD": "yes"}, cwd=tmp_path)
        assert done.stderr == ""
        assert json.loads(done.stdout) == [[name, "1", "2"], str(tmp_path), "yes", "__main__", True, first]
    assert "WORD" not in os.environ


def test_modules_of_pythonpath_are_found_in_this_run_only(forks, tmp_path):
    (tmp_path / "of_this_run.py").write_text("print('found')")
    assert forks.run(["-c", "import of_this_run"], environment={"PYTHONPATH": str(tmp_path)}).stdout == "found\n"
    assert "ModuleNotFoundError" in forks.run(["-c", "import of_this_run"], status=1).stderr


@pytest.mark.parametrize(
    ("source", "status", "error"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, ""),
    ],
)
def test_how_it_ended(forks, source, status, error):
    done = forks.run(["-c", source], status=None)
    assert done.returncode == status
    assert error in done.stderr


RANKS = (
    "import os; os.write(1, ' '.join([os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', "
    "'MASTER_PORT')] + ['\\n']).encode())"
)


def test_several_have_what_torchrun_sets(forks):
    lines = sorted(line.split() for line in forks.run(["-c", RANKS], processes=3).stdout.splitlines())
    assert [line[:4] for line in lines] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({line[4] for line in lines}) == 1


def test_when_one_fails_the_others_end(forks):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600) if os.environ['RANK'] == '0' else exit(7)"
    fork = forks.start(["-c", code], processes=2)
    assert fork.wait() == 7
    assert not any(Path(f"/proc/{pid}").exists() for pid in fork.pids)


def test_one_that_takes_too_long_is_killed_with_what_it_started(forks, tmp_path):
    code = (
        "import subprocess as s, pathlib; p = s.Popen(['sleep', '600']); "
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid)); p.wait()"
    )
    fork = forks.start(["-c", code])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert fork.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        fork.wait(0.1)
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    with contextlib.suppress(OSError):  # it is gone
        while state.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            pass


def test_a_signal_reaches_it(forks):
    fork = forks.start(
        [
            "-c",
            (
                "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); print('ready', "
                "flush=True); time.sleep(600)"
            ),
        ]
    )
    while "ready" not in fork.texts()[0]:
        assert fork.poll() is None
    fork.send_signal(signal.SIGTERM)
    assert fork.communicate()[0] == "ready\n"
    assert fork.returncode == 5


SERVER = "import psutil; print(psutil.Process().parent().ppid())"
NESTED = f"from arctic_plugins.testing import trainers; print(trainers().run(['-c', {SERVER!r}]).stdout)"


def test_what_a_test_runs_shares_its_forks():
    assert trainers().run(["-c", NESTED]).stdout.split() == trainers().run(["-c", SERVER]).stdout.split()
