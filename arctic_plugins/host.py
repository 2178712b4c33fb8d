"""Hosts, the libraries that plugins extend, as data. The core names none: each integration describes its own in the
entry-point group ``arctic_plugins.hosts``.
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
"""Entry-point group: ``transformers = "arctic_plugins_huggingface.host:HOST"``."""


@dataclass(frozen=True)
class Host:
    """What the core has to know of a host. The module that defines one imports neither the host nor torch.

    Strings like ``"module:attribute"`` are imported when they are used. An integration can be installed without any
    other: what its host takes over from another library is listed here, too.
    """

    name: str
    """The key in :attr:`arctic_plugins.Plugin.hosts`, and the entry point's name."""
    distributions: tuple[str, ...]
    """Those that may provide the host, in order of preference."""
    integration: str
    """The distribution whose metadata says with which versions of the host it works."""
    register: str
    """``"module:function"``: makes the host know what is installed. Called without arguments; idempotent."""
    probe: str | None = None
    """``"module:function"`` for ``arctic doctor``, in a process of its own: a function without arguments that gives
    :class:`~arctic_plugins.plugin.Finding` objects. It calls :attr:`register`, the way the host would."""
    groups: tuple[str, ...] = ()
    """Entry-point groups of the host's own in which the integration stands."""
    recorded: tuple[str, ...] = ()
    """Distributions whose versions are written into every checkpoint."""
    fused_siblings: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """A host that reads checkpoints, as people call it -> the last names of modules that it fuses into one. They must
    have the same codec.
    """
    refused_keys: frozenset[str] = frozenset()
    """Keys of a ``config.json`` with which the host loads something else than the model beside it."""
    hub_code_keys: frozenset[str] = frozenset()
    """Keys of a ``config.json``, without underscores around them, whose values the host takes for code on a hub where
    they have a slash.
    """
    services: Mapping[str, str] = field(default_factory=dict)
    """Name -> ``"module:function"``: what other integrations may call. See :func:`service`."""


def hosts() -> Mapping[str, Host]:
    """Name -> host, of every installed integration whose description can be loaded; in alphabetical order."""
    return _load_all()[0]


def host_failures() -> Mapping[str, PluginError]:
    """Name -> why the host of that name has no description that can be used. Raised where it is needed."""
    return _load_all()[1]


def service(name: str) -> Callable[..., Any]:
    """Import and return what an integration offers under ``name``.

    These are offered by the integrations of this project:

    - ``planned_config(checkpoint, stack) -> dict``: what the ``config.json`` of a plain checkpoint (directory or hub
      id) would say otherwise had the stack been applied.
    - ``load_config(checkpoint) -> config``: the checked config object of a checkpoint.
    - ``configured(config, stack) -> dict``: what the stack changes in a config object, which is changed.
    - ``on_the_fly(checkpoint, stack) -> dict``: overrides of a plain checkpoint's config with which a server encodes
      it.
    - ``check_shares(checkpoint, size, overrides)``: raise ConfigError unless ``size`` tensor parallel processes can
      share the model out.
    - ``shard_checkpoint(checkpoint, directory, size)``: write it as these processes hold it.

    Raises:
        PluginNotFoundError: no installed integration offers it, or the one that does is broken.
        PluginError: two integrations do.
    """
    found = {host.integration: host.services[name] for host in hosts().values() if name in host.services}
    if len(found) > 1:
        raise PluginError(
            f"the service '{name}' is offered by {' and '.join(found)}", expected="one of them", fix="uninstall one"
        )
    for integration, target in found.items():
        try:
            offered: Callable[..., Any] = load(target)
        except (ImportError, AttributeError) as error:
            raise PluginNotFoundError(
                f"the service '{name}' of {integration} cannot be imported: {error}",
                fix=f"repair or install {integration} again",
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
                f"host '{name}' is described by {owners}", expected="one of them", fix="uninstall one of the two"
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
            cause = f"calls itself '{loaded.name}', which is not its entry point's name"
    except (Exception, SystemExit) as error:  # an import can fail with anything, and it is all reported
        cause = f"cannot be imported: {type(error).__name__}: {error}"
    if cause:
        owner = _owner(point)
        raise PluginLoadError(f"host '{point.name}' of {owner} {cause}", fix=f"repair or uninstall {owner}")
    return loaded


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "an unknown distribution"
