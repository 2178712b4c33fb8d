"""Completion in a shell: what is completed, and that nothing heavy is imported for it."""

import json
import shutil
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete

from arctic_plugins.cli import arctic
from arctic_plugins.cli.completion import completion
from arctic_plugins.testing import run_python

TYPED = {
    "a command": (["do"], "plain,doctor"),
    "a plugin": (["plugins", "mo"], "plain,moe"),
    "an option": (["train", "--res"], "plain,--resume"),
    "an option of an importer": (["convert", "--scal"], "plain,--scaling"),
    "a recipe": (["train", "examples/alp"], "file,examples/alp"),
    "a recipe after an option": (["train", "--nproc", "2", ""], "file,"),
    "after what is no command": (["trian", "--res"], None),
}
"""The words after ``arctic``, of which the last is being typed, and what click answers in bash."""
COMPLETE = """
import json, os, sys
from click.shell_completion import BashComplete
from arctic_plugins.cli import arctic
from arctic_plugins.host import hosts
answers = []
for words in json.loads(sys.argv[1]):
    os.environ |= {"COMP_WORDS": " ".join(["arctic", *words]), "COMP_CWORD": str(len(words))}
    answers.append(BashComplete(arctic, {}, "arctic", "").complete().split())
print(json.dumps([answers, sorted({"torch", *hosts()} & sys.modules.keys())]))
"""


def complete(*words):
    return [item.value for item in ShellComplete(arctic, {}, "arctic", "").get_completions([*words[:-1]], words[-1])]


def test_a_shell_completes_what_is_typed_and_imports_no_host():
    words = [typed for typed, _ in TYPED.values()]
    done = run_python("-c", COMPLETE, words)
    answers, heavy = json.loads(done.stdout)
    assert answers == [[answer] if answer else [] for _, answer in TYPED.values()]
    assert heavy == []
    assert done.stderr == ""


def test_a_broken_plugin_is_completed_like_others_and_says_nothing(install_plugin, capsys):
    install_plugin("mottled", "raise RuntimeError('no luck')")
    assert complete("plugins", "mo") == ["moe", "mottled"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_that_of_the_shell(shell, capsys):
    completion.main([shell], standalone_mode=False)
    script, error = capsys.readouterr()
    assert f"_ARCTIC_COMPLETE={shell}_complete" in script
    assert error == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_it(tmp_path, capsys):
    completion.main(["bash"], standalone_mode=False)
    (tmp_path / "arctic").write_text(f'#!/bin/sh\nexec {sys.executable} -m arctic_plugins.cli "$@"\n')
    (tmp_path / "arctic").chmod(0o755)
    lines = ["COMP_WORDS=(arctic plugins mo)", "COMP_CWORD=2", f"_arctic_completion {tmp_path / 'arctic'}"]
    script = "\n".join([capsys.readouterr().out, *lines, 'echo "${COMPREPLY[@]}"'])
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == "moe\n"
