"""pytest fixtures: ``-p arctic_plugins.testing.fixtures``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from arctic_plugins import host
from arctic_plugins.discovery import process_registry
from arctic_plugins.plugin import PROJECT

__all__ = ["PluginSites", "install_plugin", "tiny_checkpoint"]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny random Llama in float32; see :func:`arctic_plugins.testing.tiny_llama`."""
    from arctic_plugins.testing.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


class PluginSites:
    """Installer of plugins from source, each as its own distribution under ``root``, until :meth:`close`.

    See :func:`install_plugin`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.added: list[str] = []

    def __call__(
        self,
        name: str,
        source: str,
        *,
        distribution: str | None = None,
        module: str | None = None,
        group: str = PROJECT,
    ) -> Path:
        module, distribution = module or f"{name}_plugin", distribution or f"{name}-dist"
        site = self.root / f"site-{distribution}"
        metadata = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (site / f"{module}.py").write_text(dedent(source), encoding="utf-8")
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n", encoding="utf-8"
        )
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:plugin\n", encoding="utf-8")
        sys.path.insert(0, str(site))
        self.added.append(str(site))
        _forget()
        return site

    def close(self) -> None:
        for site in self.added:
            sys.path.remove(site)
            for module in [
                name
                for name, loaded in sys.modules.items()
                if (getattr(loaded, "__file__", None) or "").startswith(site)
            ]:
                del sys.modules[module]
        _forget()


def _forget() -> None:
    process_registry.cache_clear()
    host._load_all.cache_clear()


@pytest.fixture
def install_plugin(tmp_path: Path) -> Iterator[PluginSites]:
    """Return a function that installs a plugin from source as its own distribution for the duration of the test.

    ``install_plugin("name", source)`` writes a module ``name_plugin`` whose ``plugin`` object is the entry point, and
    the metadata of a distribution ``name-dist`` 1.0. It returns the directory that contains both (put it on
    ``PYTHONPATH`` for child processes). With ``group="arctic_plugins.hosts"``, the object is a
    :class:`~arctic_plugins.host.Host`.
    """
    sites = PluginSites(tmp_path)
    yield sites
    sites.close()
