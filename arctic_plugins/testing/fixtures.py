"""The pytest plugin: fixtures for tests of plugins.

pytest loads it in every project where ``arctic-plugins`` is installed (entry point ``pytest11``), so importing it loads
nothing but the standard library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

__all__ = ["PluginSites", "install_plugin", "tiny_checkpoint", "tiny_models", "workers"]

# Failures of laws show the values that they compare.
pytest.register_assert_rewrite(
    *(
        f"arctic_plugins.testing.{name}"
        for name in ("codecs", "commands", "dispatches", "losses", "architectures", "placements", "plugins", "ropes")
    )
)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return :func:`arctic_plugins.testing.tiny_model` without a directory; each model is written once in a session."""
    written: dict[str, Path] = {}

    def of(model_type: str, **options: Any) -> Path:
        key = json.dumps([model_type, options], sort_keys=True)
        if key not in written:
            from arctic_plugins.testing.models import tiny_model

            written[key] = tiny_model(tmp_path_factory.mktemp("models") / model_type, model_type, **options)
        return written[key]

    return of


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_models: Callable[..., Path]) -> Path:
    """Return a tiny random Llama in float32; see :func:`arctic_plugins.testing.tiny_llama`."""
    return tiny_models("llama")


@pytest.fixture(scope="session")
def workers() -> Mapping[str, Any]:
    """Start a process as hosts start their workers, and return the ``plugins`` and the ``errors`` that it found.

    Tests that use it are skipped if no host with workers (:attr:`arctic_plugins.Host.probe`) is installed.
    """
    return found_in_workers()


def found_in_workers() -> Mapping[str, Any]:
    """Start the process of :func:`workers`, with what is installed now."""
    from arctic_plugins.host import hosts
    from arctic_plugins.resolver import host_version
    from arctic_plugins.testing.forks import engines

    probes = [host.probe for host in hosts().values() if host.probe and host_version(host.name) is not None]
    if not probes:
        pytest.skip("no host with workers is installed, such as vLLM with arctic-plugins-vllm")
    found: dict[str, Any] = json.loads(engines().run(["-c", _WORKER, *probes]).stdout.splitlines()[-1])
    return found


_WORKER = """
import json, sys
from arctic_plugins import process_registry
from arctic_plugins.registry import load
errors = [finding.text for probe in sys.argv[1:] for finding in load(probe)() if finding.status == "error"]
print(json.dumps({"plugins": process_registry().plugins, "errors": errors}))
"""


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
        group: str = "arctic_plugins",
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
    from arctic_plugins import host
    from arctic_plugins.discovery import process_registry

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
