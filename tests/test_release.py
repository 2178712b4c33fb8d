"""`make version` and `make release`, in a small repository of two distributions. tests/test_wheels.py builds ours."""

import json
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "0.1.0"
license-files = ["LICENSE"]
requires-python = ">=3.11"
dependencies = {requires}

[project.optional-dependencies]
all = ["arctic-plugins-b"]

[tool.arctic-plugins]
distributions = ["plugins/*"]

[tool.hatch.build.targets.wheel]
packages = ["{package}"]
exclude = ["*.cpp"]
"""
CHANGELOG = "# Changelog\n\n## Unreleased\n\n- New.\n\n## 0.0.9 - 2026-01-01\n\n- Old.\n"


@pytest.fixture
def repository(tmp_path):
    """A committed repository of arctic-plugins and arctic-plugins-b, whose wheels leave out C++ files."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "release.py", tmp_path / ".ci")
    for folder, name, requires in (
        (tmp_path, "arctic-plugins", ["click>=8"]),
        (tmp_path / "plugins" / "b", "arctic-plugins-b", ["arctic-plugins==0.1.0", "click>=8"]),
    ):
        package = name.replace("-", "_")
        (folder / package).mkdir(parents=True)
        (folder / package / "py.typed").touch()
        (folder / "LICENSE").write_text("Do what you like.\n")
        (folder / "pyproject.toml").write_text(
            PROJECT.format(name=name, requires=json.dumps(requires), package=package)
        )
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(repository, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", repository, *identity, *arguments], check=True, capture_output=True)


def commit(repository):
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "x")


def replace(repository, file, old, new):
    text = (repository / file).read_text()
    assert old in text
    (repository / file).write_text(text.replace(old, new))


def release(repository, *arguments):
    """Run the script, and return its status and what it printed."""
    command = [sys.executable, repository / ".ci" / "release.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout + done.stderr


def refused(repository, *arguments):
    """Return the one line with which the script refuses."""
    status, text = release(repository, *arguments)
    assert status == 1
    assert text.count("\n") == 1, text
    assert not (repository / "dist").exists()
    return text


def test_a_version_is_written_everywhere_and_the_changelog_dated(repository):
    assert release(repository, "version", "0.2.0")[0] == 0
    for folder in (repository, repository / "plugins" / "b"):
        text = (folder / "pyproject.toml").read_text()
        assert 'version = "0.2.0"' in text
        assert "0.1.0" not in text
        assert '"click>=8"' in text
        assert 'all = ["arctic-plugins-b"]' in text
    dated = CHANGELOG.replace("## Unreleased\n", f"## Unreleased\n\n## 0.2.0 - {date.today().isoformat()}\n")
    assert (repository / "CHANGELOG.md").read_text() == dated
    assert "nothing to release: CHANGELOG.md has no unreleased changes" in refused(repository, "version", "0.3.0")
    assert "'newest' is not a version" in refused(repository, "version", "newest")
    assert "0.1.9 comes before the present version, 0.2.0" in refused(repository, "version", "0.1.9")
    replace(repository, "CHANGELOG.md", "## Unreleased\n", "## Unreleased\n\n- Late.\n")
    assert "move them into the section '0.2.0 - 2" in refused(repository, "version", "0.2.0")


def test_a_release_is_refused_for_what_is_wrong(repository):
    part = "plugins/b/pyproject.toml"
    assert "no section '## 0.1.0 - YYYY-MM-DD'" in refused(repository, "build")
    assert release(repository, "version", "0.1.0")[0] == 0
    assert "uncommitted changes: CHANGELOG.md; commit or stash" in refused(repository, "build")
    replace(repository, part, "arctic-plugins==0.1.0", "arctic-plugins>=0.1.0")
    assert "arctic-plugins-b requires arctic-plugins>=0.1.0; expected arctic-plugins==0.1.0" in refused(
        repository, "build"
    )
    replace(repository, part, '"arctic-plugins>=0.1.0", ', "")
    assert "arctic-plugins-b does not require arctic-plugins; expected arctic-plugins==0.1.0" in refused(
        repository, "build"
    )
    replace(repository, part, 'version = "0.1.0"', 'version = "0.1.1"')
    assert "the versions differ: arctic-plugins 0.1.0, arctic-plugins-b 0.1.1" in refused(repository, "build")
    git(repository, "checkout", part)
    replace(repository, "CHANGELOG.md", "## Unreleased\n", "## Unreleased\n\n- Late.\n")
    assert "has unreleased changes; move them into the section '0.1.0 - 2" in refused(repository, "build")
    replace(repository, "CHANGELOG.md", "- Late.\n", "")
    commit(repository)
    git(repository, "tag", "v0.1.0")
    assert "the tag v0.1.0 exists" in refused(repository, "build")


def test_a_wheel_that_lacks_a_file_is_refused(repository):
    (repository / "arctic_plugins" / "kernel.cpp").touch()
    status, text = release(repository, "build", "--draft")
    assert status == 1
    assert "whl is not whole; it differs from the source in arctic_plugins/kernel.cpp" in text
    assert not (repository / "dist").exists()
