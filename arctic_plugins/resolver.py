"""Resolution of a set of plugins into an ordered stack without conflicts.

It is pure: it only reads class attributes, installed versions and what integrations declare about their hosts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import combinations

from packaging.requirements import Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from arctic_plugins.errors import HostVersionError, ResolveError
from arctic_plugins.host import host_failures, hosts
from arctic_plugins.plugin import SLOTS, Plugin

__all__ = ["check_hosts", "host_range", "host_version", "resolve"]


def resolve(plugins: Iterable[Plugin]) -> tuple[Plugin, ...]:
    """Check ``plugins`` against each other and order them.

    The order respects every ``after`` and ``before``. Plugins without such a relation are in alphabetical order, so
    that the same set always results in the same stack, however it was written.

    Raises:
        ResolveError: an unmet ``requires``, two plugins that conflict or fill the same exclusive slot of the model, or
            a cycle; the message names the plugins.
    """
    by_name = {plugin.name: plugin for plugin in sorted(plugins, key=lambda plugin: plugin.name)}
    everyone = list(by_name.values())
    for plugin in everyone:
        for wanted in sorted(plugin.requires):
            if not any(_matching(wanted, everyone, other_than=plugin)):
                raise ResolveError(
                    f"plugin '{plugin.name}' requires {_described(wanted)}, which is not in the stack",
                    fix=f"add it under 'plugins:', or remove '{plugin.name}'",
                )
        for unwanted in sorted(plugin.conflicts):
            for other in _matching(unwanted, everyone, other_than=plugin):
                raise ResolveError(f"plugins '{plugin.name}' and '{other.name}' conflict", fix="remove one of the two")
    for first, second in combinations(everyone, 2):
        if shared := {
            slot for slot in first.slots & second.slots if SLOTS[slot].scope == "model" and SLOTS[slot].exclusive
        }:
            raise ResolveError(
                f"plugins '{first.name}' and '{second.name}' both fill the slot '{min(shared)}', but a model has only "
                "one such slot",
                fix="remove one of the two",
            )
    return _ordered(everyone)


def _ordered(everyone: Sequence[Plugin]) -> tuple[Plugin, ...]:
    earlier: dict[str, set[str]] = {plugin.name: set() for plugin in everyone}
    for plugin in everyone:
        for key in plugin.after:
            earlier[plugin.name].update(other.name for other in _matching(key, everyone, other_than=plugin))
        for key in plugin.before:
            for other in _matching(key, everyone, other_than=plugin):
                earlier[other.name].add(plugin.name)
    sorter = TopologicalSorter(earlier)
    try:
        sorter.prepare()
    except CycleError as error:
        raise ResolveError(
            f"the order of the plugins is a cycle: {' before '.join(error.args[1])}",
            fix="remove one 'after' or 'before' of these plugins",
        ) from None
    by_name = {plugin.name: plugin for plugin in everyone}
    order: list[Plugin] = []
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()])
        name = ready.pop(0)
        sorter.done(name)
        order.append(by_name[name])
    return tuple(order)


def _matching(key: str, plugins: Iterable[Plugin], *, other_than: Plugin) -> Iterator[Plugin]:
    """Return the plugins that ``key`` refers to: the one of that name, and those that fill the slot of that name."""
    return (plugin for plugin in plugins if plugin is not other_than and (plugin.name == key or key in plugin.slots))


def _described(key: str) -> str:
    return f"a plugin that fills '{key}'" if key in SLOTS else f"'{key}'"


def host_version(host: str) -> tuple[str, str] | None:
    """Return the installed distribution that provides ``host`` and its version, or None if there is none."""
    for distribution in _distributions(host):
        try:
            return distribution, version(distribution)
        except PackageNotFoundError:
            continue
    return None


def host_range(host: str) -> tuple[str, SpecifierSet] | None:
    """Return the installed integration of ``host`` and the range that its metadata declares, or None.

    The range is declared nowhere else.
    """
    if (known := hosts().get(host)) is None:
        return None
    try:
        requirements = [Requirement(line) for line in requires(known.integration) or []]
    except PackageNotFoundError:
        return None
    declared = next((each.specifier for each in requirements if each.name in known.distributions), SpecifierSet())
    return known.integration, declared


def _distributions(host: str) -> tuple[str, ...]:
    return hosts()[host].distributions if host in hosts() else (host,)


def check_hosts(plugins: Iterable[Plugin | type[Plugin]], host: str) -> None:
    """Check that ``host`` is installed, in the range that its integration declares and to which plugins narrow it.

    Raises:
        HostVersionError: the message names who declares the range, the version found and the range.
        PluginError: the integration's description of the host cannot be read.
    """
    if host in host_failures():
        raise host_failures()[host]
    found = host_version(host)
    if found is None:
        raise HostVersionError(f"{host} is not installed", fix=f"pip install {' or '.join(_distributions(host))}")
    distribution, installed = found
    declared = [(f"plugin '{plugin.name}'", plugin.hosts[host]) for plugin in plugins if host in plugin.hosts]
    if integration := host_range(host):
        declared.insert(0, (integration[0], str(integration[1])))
    for who, wanted in declared:
        try:
            fits = SpecifierSet(wanted).contains(Version(installed), prereleases=True)
        except InvalidSpecifier as error:
            raise HostVersionError(f"{who} declares an invalid range for {host}: {error}", fix="report it") from error
        if not fits:
            raise HostVersionError(
                f"{who} does not work with {distribution} {installed}",
                expected=f"{distribution}{wanted}",
                fix=f"pip install '{distribution}{wanted}', or a release of the plugin or integration for {installed}",
            )
