"""The distributions of this repository: what has to name them names each."""

import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from arctic_plugins.host import GROUP, Host
from arctic_plugins.registry import FIRST_PARTY


@pytest.fixture(scope="module")
def core(distributions):
    return next(iter(distributions))


@pytest.fixture(scope="module")
def projects(distributions):
    """Name -> the table ``project`` of its metadata."""
    return {about["project"]["name"]: about["project"] for about in distributions.values()}


@pytest.fixture(scope="module")
def plugins(projects):
    """Plugin -> its distribution."""
    found = [(name, project.get("entry-points", {}).get("arctic_plugins", {})) for name, project in projects.items()]
    return {plugin: name for name, points in found for plugin in points}


def test_the_extra_all_has_every_plugin_and_the_extras_together_every_distribution(projects, plugins):
    extras = projects["arctic-plugins"]["optional-dependencies"]
    names = {extra: {Requirement(line).name for line in lines} for extra, lines in extras.items()}
    assert names["all"] == {*plugins.values(), "arctic-plugins-huggingface"}
    ours = {name for named in names.values() for name in named if name.startswith("arctic-plugins")}
    assert ours == projects.keys()


def test_the_core_knows_which_plugins_are_of_this_repository(plugins):
    assert plugins == {plugin: f"arctic-plugins-{plugin}" for plugin in FIRST_PARTY}


def test_entry_points_lead_somewhere(projects):
    for project in projects.values():
        for group, points in project.get("entry-points", {}).items():
            for name, value in points.items():
                found = EntryPoint(name, value, group).load()
                assert isinstance(found, {GROUP: Host, "pytest11": ModuleType}.get(group, Callable))


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_installs_and_checks_each(core, distributions):
    def would_do(target):
        command = ["make", "--dry-run", "--always-make", target]
        return subprocess.run(command, cwd=core, capture_output=True, text=True, check=True).stdout

    install, lint = would_do("install"), would_do("lint")
    for folder in distributions:
        assert f" -e {folder.relative_to(core)}" in install
        [package] = [marker.parent for marker in folder.glob("*/py.typed")]
        assert f" {package.relative_to(core)}" in lint.partition("/mypy")[2]


def test_their_tests_are_among_those_that_pytest_collects(core, distributions):
    collected = distributions[core]["tool"]["pytest"]["ini_options"]["testpaths"]
    for folder in distributions:
        assert (folder / "tests").is_dir()
        assert (folder / "tests").relative_to(core).parts[0] in collected
