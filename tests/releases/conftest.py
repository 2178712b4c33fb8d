"""Plugins of earlier releases, installed while their own tests run against the core of today."""

import os
import sys
from pathlib import Path

import pytest

from arctic_plugins.testing import Suite
from arctic_plugins.testing.fixtures import found_in_workers

SNAPSHOTS = sorted(path.parent for path in Path(__file__).parent.glob("*/*/pyproject.toml"))
sys.path.extend(map(str, SNAPSHOTS))  # their tests import them when they are collected


def pytest_collection_modifyitems(items):
    """Mark all of it as slow, since together it takes over a minute, and what starts vLLM's engine as such."""
    for item in items:
        if any(path in item.path.parents for path in SNAPSHOTS):
            item.add_marker("slow")
            if "vllm" in item.name:
                item.add_marker("vllm")


@pytest.fixture(scope="module")
def snapshot(request, installed, tmp_path_factory):
    """Install the distribution to which the tests of this module belong."""
    [source] = [path for path in SNAPSHOTS if path in request.path.parents] or [None]
    if source is None:
        yield None
        return
    with installed(source, tmp_path_factory.mktemp("site")) as paths, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([paths, os.environ.get("PYTHONPATH", "")]))
        patch.setattr(Suite, "deprecations", "ignore")  # what is deprecated still works
        yield source


@pytest.fixture(autouse=True)
def _installed(snapshot):
    pass


@pytest.fixture(scope="module")
def workers(snapshot):
    """As in the kit, with the snapshot installed in the worker."""
    return found_in_workers()
