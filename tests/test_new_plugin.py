"""``arctic new-plugin``: a plugin of every kind is created, installed without network, and passes its own tests."""

import contextlib
import os
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from arctic_plugins import CONTRACT
from arctic_plugins.cli.new_plugin import KINDS, TEMPLATES, new_plugin
from arctic_plugins.testing import run_python, trainers

NAMES = {kind: f"my-{kind}2" for kind in KINDS}
"""Names of two words: in Python they are written in another way than in a recipe, and classes in a third one."""


@pytest.fixture(scope="module")
def created(tmp_path_factory):
    """A directory with a plugin of every kind, and ``site``, where they are installed."""
    directory = tmp_path_factory.mktemp("created")
    with contextlib.chdir(directory):
        for kind, name in NAMES.items():
            new_plugin.main([name, "--kind", kind], standalone_mode=False)
    target = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", directory / "site"]
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run_python("-m", "pip", "install", *target, *(directory / name for name in NAMES.values()), environment=quiet)
    return directory


@pytest.fixture
def run(created):
    """A function that runs Python in ``created``, where the plugins are installed."""
    paths = os.pathsep.join([str(created / "site"), os.environ.get("PYTHONPATH", "")])

    def run(*arguments):
        return trainers().run(arguments, cwd=created, environment={"PYTHONPATH": paths}, timeout=600).stdout

    return run


def laws(run, selected):
    """Run the tests of all plugins that ``selected`` selects, in one process."""
    options = ["-c", os.devnull, "--rootdir=.", "--import-mode=importlib", "-p", "arctic_plugins.testing.fixtures"]
    return run("-m", "pytest", "-rA", "--tb=short", *options, "-k", selected, *NAMES.values())


def test_every_template_is_one_of_the_kinds():
    assert {path.parent.name for path in TEMPLATES.glob("*/arctic_acme")} == {"common", *KINDS}


def test_nothing_is_left_of_the_templates_names(created):
    for name in NAMES.values():
        files = [path for path in (created / name).rglob("*") if path.is_file() and "build" not in path.parts]
        assert {".gitignore", "README.md", "pyproject.toml", "py.typed", "tests.yml"} <= {path.name for path in files}
        assert not [path for path in files if "acme" in f"{path}{path.read_text()}".lower()]


def test_they_require_this_contract_and_a_release_that_has_it(created):
    release = tomllib.loads((TEMPLATES.parents[1] / "pyproject.toml").read_text())["project"]["version"]
    for name in NAMES.values():
        about = tomllib.loads((created / name / "pyproject.toml").read_text())["project"]
        assert all(Requirement(line).specifier.contains(release) for line in about["dependencies"])
        assert f"contracts = frozenset({{{CONTRACT}}})" in next((created / name).glob("arctic_*/plugin.py")).read_text()


def test_they_are_listed(run):
    listed = run("-m", "arctic_plugins.cli", "plugins")
    for name in NAMES.values():
        [line] = [line for line in listed.splitlines() if line.startswith(f"{name} ")]
        assert f"arctic-{name} 0.1.0" in line
        assert "ok" in line


def test_they_pass_the_checks_of_their_own_workflow(created):
    for name in NAMES.values():
        subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=created / name, check=True)


def test_they_pass_their_own_tests_and_the_laws(run):
    output = laws(run, "not worker and not vllm")
    for name in NAMES.values():
        assert f"PASSED {name}/tests/test_laws.py::TestPlugin::test_it_composes_with[fp8]" in output


@pytest.mark.vllm
def test_they_are_registered_in_vllms_workers_and_the_model_is_served(run):
    output = laws(run, "worker or vllm")
    assert output.count("PASSED") == len(KINDS) + 1
