"""Hosts, the libraries that plugins extend, as data.

The core names no host: each integration describes its own in the entry-point group ``arctic_plugins.hosts``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from arctic_plugins.errors import PluginError, PluginLoadError, PluginNotFoundError
from arctic_plugins.registry import load

__all__ = ["GROUP", "Host", "host_failures", "hosts", "service"]

GROUP = "arctic_plugins.hosts"
"""Entry-point group of descriptions of hosts: ``transformers = "arctic_plugins_huggingface.host:HOST"``."""


@dataclass(frozen=True)
class Host:
    """What the core needs to know about a host. The module that defines it imports neither the host nor torch.

    Strings such as ``"module:attribute"`` are imported when they are used. Each integration can be installed without
    the others, so its description also includes what its host takes over from another library.
    """

    name: str
    """The key in :attr:`arctic_plugins.Plugin.hosts`, and the entry point's name."""
    distributions: tuple[str, ...]
    """The distributions that may provide the host, in order of preference."""
    integration: str
    """The distribution whose metadata declares the supported versions of the host."""
    register: str
    """``"module:function"`` that makes the host aware of installed plugins. Called without arguments; idempotent."""
    probe: str | None = None
    """``"module:function"`` that ``arctic doctor`` calls in a process of its own, without arguments. It calls
    :attr:`register` in the way the host would, and returns :class:`~arctic_plugins.plugin.Finding` objects."""
    groups: tuple[str, ...] = ()
    """The host's own entry-point groups that contain the integration."""
    recorded: tuple[str, ...] = ()
    """Distributions whose versions are recorded in every checkpoint."""
    fused_siblings: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """A host that reads checkpoints, as users know it -> groups of modules, by the last parts of their names, that it
    fuses into one. The modules of a group must have the same codec.
    """
    refused_keys: frozenset[str] = frozenset()
    """Keys of a ``config.json`` that make the host load something other than the model next to it."""
    hub_code_keys: frozenset[str] = frozenset()
    """Keys of a ``config.json``, without the underscores around them, whose values the host takes for code on a hub if
    they contain a slash.
    """
    services: Mapping[str, str] = field(default_factory=dict)
    """Name -> ``"module:function"`` that other integrations may call; see :func:`service`."""


def hosts() -> Mapping[str, Host]:
    """Return name -> host for every installed integration whose description can be loaded, in alphabetical order."""
    return _load_all()[0]


def host_failures() -> Mapping[str, PluginError]:
    """Return name -> error for every host whose description cannot be used. It is raised where the host is needed."""
    return _load_all()[1]


def service(name: str) -> Callable[..., Any]:
    """Import and return what an integration offers under ``name``.

    The integrations of this project offer the following. Those that read a checkpoint take ``trust_remote_code``, False
    by default: whether the checkpoint's own code may be executed.

    - ``planned_config(checkpoint, stack) -> dict``: the entries of a plain checkpoint's ``config.json`` (directory or
      Hub id) that would be different if the stack had been applied.
    - ``load_config(checkpoint) -> config``: the checked config object of a checkpoint.
    - ``configured(config, stack) -> dict``: changes a config object as the stack requires, and returns the changes.
    - ``on_the_fly(checkpoint, stack) -> dict``: overrides for a plain checkpoint's config that make a server encode it.
    - ``check_shares(checkpoint, size, overrides)``: raises ConfigError unless the model can be divided among ``size``
      tensor parallel processes.
    - ``shard_checkpoint(checkpoint, directory, size)``: writes it in the parts that these processes hold.

    Raises:
        PluginNotFoundError: no installed integration offers it, or the one that does is broken.
        PluginError: two integrations offer it.
    """
    found = {host.integration: host.services[name] for host in hosts().values() if name in host.services}
    if len(found) > 1:
        raise PluginError(
            f"the service '{name}' is offered by {' and '.join(found)}", expected="only one", fix="uninstall the others"
        )
    for integration, target in found.items():
        try:
            offered: Callable[..., Any] = load(target)
        except (ImportError, AttributeError) as error:
            raise PluginNotFoundError(
                f"the service '{name}' of {integration} cannot be imported: {error}",
                fix=f"repair or reinstall {integration}",
            ) from error
        return offered
    broken = "; ".join(str(error) for error in host_failures().values())
    raise PluginNotFoundError(f"no installed integration offers the service '{name}'", fix=broken)


@cache
def _load_all() -> tuple[dict[str, Host], dict[str, PluginError]]:
    points: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        points.setdefault(point.name, []).append(point)
    found: dict[str, Host] = {}
    failures: dict[str, PluginError] = {}
    for name, several in points.items():
        if len(several) > 1:
            owners = " and ".join(sorted(map(_owner, several)))
            failures[name] = PluginError(
                f"host '{name}' is described by {owners}", expected="only one", fix="uninstall the others"
            )
            continue
        try:
            found[name] = _load(several[0])
        except PluginLoadError as error:
            failures[name] = error
    return found, failures


def _load(point: EntryPoint) -> Host:
    try:
        loaded = point.load()
        cause = "" if isinstance(loaded, Host) else f"is {loaded!r}, not an arctic_plugins.host.Host"
        if not cause and loaded.name != point.name:
            cause = f"has the name '{loaded.name}', which is not its entry point's name"
    except (Exception, SystemExit) as error:  # an import can raise anything, and all of it is reported
        cause = f"cannot be imported: {type(error).__name__}: {error}"
    if cause:
        owner = _owner(point)
        raise PluginLoadError(f"host '{point.name}' of {owner} {cause}", fix=f"repair or uninstall {owner}")
    return loaded


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an unknown distribution"
