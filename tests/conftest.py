"""Fixtures of the tests that cross rooms."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from arctic_plugins.discovery import process_registry


@pytest.fixture(scope="session")
def int8_plugin(tmp_path_factory):
    """The third party's plugin of ``tests/int8_plugin``, built and installed as its own distribution for the session.

    Gives the directory it is installed in, for ``PYTHONPATH`` of child processes.
    """
    site = tmp_path_factory.mktemp("site")
    source = Path(__file__).parent / "int8_plugin"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", site, source]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    sys.path.insert(0, str(site))
    process_registry.cache_clear()
    yield site
    sys.path.remove(str(site))
    process_registry.cache_clear()
