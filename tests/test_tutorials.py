"""The tutorials, as a reader follows them: every file is written and every command runs, in their order.

The purpose of a block follows its language: ``file=PATH`` is a file, ``append=PATH`` are methods of the class at its
end, and ``insert=PATH before="LINE"`` goes above the only line that begins like that. Commands end with status 0, or 1
where the block says ``fails``. The lines of a ``text`` block are in the output of the commands before it.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path
from textwrap import indent

import pytest

from arctic_plugins.testing import engines, run_python, small_engine, trainers

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r'^```(\w+)(?: (?:(\w+)(?:=(\S+)(?: before="([^"]*)")?)?))?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


PYTHON = {
    "arctic": ["-m", "arctic_plugins.cli"],
    "pytest": ["-m", "pytest", "-p", "arctic_plugins.testing.fixtures"],
    "python": [],
}
SITE = "import sys, sysconfig; print(sysconfig.get_path('purelib', vars={'base': sys.argv[1]}))"


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """A function that follows a page in an empty directory."""
    prefix = tmp_path / "prefix"
    monkeypatch.setenv("PYTHONPATH", run_python("-c", SITE, prefix).stdout.strip(), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)

    def pip(*arguments):
        """Install to a prefix. A process finds that by its PYTHONPATH, and what is installed in editable mode, too."""
        own = {"PIP_PREFIX": str(prefix), "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        done = run_python("-m", "pip", *arguments, environment=own)
        monkeypatch.setenv("PYTHONPATH", str(Path(arguments[-1]).absolute()), prepend=os.pathsep)
        return done

    def command(line, status):
        name, *arguments = shlex.split(line)
        if name == "pip":
            return pip(*arguments)
        if name not in PYTHON:
            return subprocess.run([name, *arguments], check=True, capture_output=True, text=True)
        served = name == "python" and Path(arguments[0]).is_file() and "vllm" in Path(arguments[0]).read_text()
        forks, own = (engines(), small_engine(tmp_path / "cache")) if served else (trainers(), {})
        return forks.run([*PYTHON[name], *arguments], environment=own, status=status)

    def run(page):
        output, text = "", (DOCS / page).read_text()
        blocks = BLOCK.findall(text)
        assert 2 * len(blocks) == len(re.findall("^```", text, re.MULTILINE))
        for language, action, path, before, body in blocks:
            if action == "file":
                Path(path).write_text(body)
            elif action == "append":
                with Path(path).open("a") as file:
                    file.write("\n" + indent(body, "    "))
            elif action == "insert":
                source = Path(path).read_text()
                assert source.count(f"\n{before}") == 1
                inserted = indent(body, re.match(" *", before)[0])
                Path(path).write_text(source.replace(f"\n{before}", f"\n{inserted}{before}"))
            elif language == "bash":
                done = [command(line, 1 if action == "fails" else 0) for line in body.splitlines()]
                output = "".join(each.stdout + each.stderr for each in done)
            else:
                assert language == "text", f"nothing runs this block of {page}:\n{body}"
                assert all(line in output for line in body.splitlines()), output

    return run


def test_the_tutorial_of_a_trainer_plugin(follow):
    follow("writing-a-trainer-plugin.md")


@pytest.mark.vllm
def test_the_tutorial_of_a_codec(follow):
    follow("writing-a-codec.md")
