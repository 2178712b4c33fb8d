"""pytest finds the kit by its entry point, and pays nothing for it in projects that do not use it."""

import os
import tomllib
from pathlib import Path

import pytest

from arctic_plugins.testing import run_python

ROOT = Path(__file__).parents[2]
UNRELATED = """
import sys

def test_nothing():
    heavy = ("torch", "transformers", "vllm", "pydantic", "yaml", "click", "arctic_plugins.plugin")
    assert "arctic_plugins.testing.fixtures" in sys.modules
    assert not [name for name in heavy if name in sys.modules]
"""
CONTINUE = "--continue-on-collection-errors"
AUTHORS = """
import warnings

from arctic_plugins import ArcticDeprecationWarning
from arctic_plugins.frozen import Codec, PlainCodec
from arctic_plugins.testing import CodecSuite, Suite

class Broken(PlainCodec):
    def nbytes(self, shape):
        return 1

class Old(Suite):
    def test_law(self):
        warnings.warn("this is deprecated", ArcticDeprecationWarning)

class TestOld(Old):
    pass

class TestTolerated(Old):
    deprecations = "default"

class TestMine(CodecSuite):
    codecs = [PlainCodec("float32"), Broken("float32")]
    tolerance = 0.0

class TestNothing(CodecSuite):
    pass

def test_fixtures(install_plugin):
    assert (install_plugin("mine", "plugin = None") / "mine_plugin.py").is_file()
"""


@pytest.fixture
def author(tmp_path):
    """A function that runs a test file in a project of its own, and returns what pytest printed.

    The metadata is that of this source, which is what an installation from it has.
    """
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    metadata = tmp_path / "site" / "arctic_plugins-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: arctic-plugins\nVersion: 0.1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in each.items())
        for group, each in points.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    paths = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])

    def run(source, *options, status):
        (tmp_path / "project").mkdir()
        (tmp_path / "project" / "test_it.py").write_text(source)
        command = ["-m", "pytest", "-p", "no:cacheprovider", *options, "test_it.py"]
        return run_python(*command, cwd=tmp_path / "project", environment={"PYTHONPATH": paths}, status=status).stdout

    return run


def test_a_project_that_does_not_use_it_imports_nothing_more(author):
    assert "1 passed" in author(UNRELATED, status=0)


def test_an_author_gets_laws_fixtures_and_messages(author):
    output = author(AUTHORS, "-p", "arctic_plugins.testing.fixtures", "-rA", "--tb=short", CONTINUE, status=1)
    assert "PASSED test_it.py::test_fixtures" in output, "and naming the plugin as before does no harm"
    assert "PASSED test_it.py::TestMine::test_products_are_those_of_the_decoded_weight[plain (dtype float32)" in output
    assert "AssertionError: nbytes(8, 64) is 1, but the buffers take 2048" in output
    assert "assert 1 == 2048" in output, "values are shown, as in an author's own tests"
    assert "FAILED test_it.py::TestOld::test_law" in output
    assert "PASSED test_it.py::TestTolerated::test_law" in output
    assert "ArcticDeprecationWarning: this is deprecated" in output
    assert "TestNothing sets no codecs" in output
