"""One run at a time in an output directory."""

import os

import pytest
from arctic_plugins_huggingface.files.locking import LOCK, in_use_by_us
from arctic_plugins_huggingface.training.check import check_output

from arctic_plugins.errors import ConfigError
from arctic_plugins.testing import run_python


def test_a_second_run_learns_whose_directory_it_is(tmp_path):
    output = tmp_path / "out, ünïcode"
    with in_use_by_us(output):
        with (
            pytest.raises(
                ConfigError,
                match=rf"out, ünïcode is in use by process {os.getpid()} on .*, since .*; wait until that run ends",
            ),
            in_use_by_us(output),
        ):
            pytest.fail("two runs in one directory")
        assert (output / LOCK).is_file()
        check_output(output, new=True)  # the lock is nobody's result
    assert not output.exists()
    output.mkdir()
    with in_use_by_us(output):
        pass
    assert list(output.iterdir()) == []


def test_a_run_that_was_killed_leaves_no_lock(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from arctic_plugins_huggingface.files.locking import in_use_by_us\n"
        "with in_use_by_us(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    run_python("-c", code, tmp_path / "out", status=-9)
    assert (tmp_path / "out" / LOCK).read_text().startswith("process ")
    with in_use_by_us(tmp_path / "out"):
        pass
    assert not (tmp_path / "out" / LOCK).exists()


def test_other_processes_of_a_run_wait_for_nobody(tmp_path, monkeypatch):
    with in_use_by_us(tmp_path / "out"):
        monkeypatch.setenv("RANK", "1")
        with in_use_by_us(tmp_path / "out"):
            pass


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="cannot be opened"), in_use_by_us(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"
