"""Discovery of plugins: entry points are listed without importing anything; a plugin is imported when it is enabled.

A broken plugin is an error if it is enabled, and never otherwise.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Set
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, entry_points, version
from pathlib import Path

import pluggy

from arctic_plugins import hookspecs
from arctic_plugins.errors import ArcticError, PluginError, PluginLoadError, PluginNotFoundError, suggest
from arctic_plugins.plugin import CONTRACT, PROJECT, SLOTS, Plugin, PluginConfig
from arctic_plugins.registry import Registry

__all__ = ["InstalledPlugin", "identity", "installed_plugins", "load_plugin", "process_registry"]

_PLUGGYS = ("tryfirst", "trylast", "wrapper", "hookwrapper", "optionalhook")
"""Options of pluggy's ``hookimpl`` (1.6) that are refused. A stack calls the hook of one plugin after another, and has
its own options for their order.
"""


@dataclass(frozen=True)
class InstalledPlugin:
    """An entry point in the group ``arctic_plugins``; nothing of it has been imported."""

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint

    def load(self) -> type[Plugin]:
        """Import the plugin class and check that it fulfills the contract.

        Raises:
            PluginLoadError: the import fails, the object is not a valid plugin, or it needs another version of the
                contract; the message names the plugin, its distribution and the cause.
        """
        try:
            loaded = self.entry_point.load()
        except (Exception, SystemExit) as error:  # an import can raise anything, and all of it is reported
            raise self.broken(f"cannot be imported: {type(error).__name__}: {error}") from error
        if not (inspect.isclass(loaded) and issubclass(loaded, Plugin)):
            raise self.broken(
                f"is not a plugin: '{self.entry_point.value}' is {loaded!r}, not a subclass of arctic_plugins.Plugin"
            )
        self._check_contract(loaded)
        if getattr(loaded, "name", None) != self.name:
            raise self.broken(f"has the name '{getattr(loaded, 'name', None)}', which is not its entry point's name")
        if not (inspect.isclass(loaded.config) and issubclass(loaded.config, PluginConfig)):
            raise self.broken(f"has config {loaded.config!r}, which is not a subclass of arctic_plugins.PluginConfig")
        if unknown := loaded.slots - SLOTS.keys():
            raise self.broken(f"fills unknown slots {sorted(unknown)} ({suggest(min(unknown), SLOTS)})")
        for name in dir(loaded):
            given = getattr(getattr(loaded, name, None), f"{PROJECT}_impl", None) or {}
            if refused := [option for option in _PLUGGYS if given.get(option)]:
                raise self.broken(
                    f"marks {name} with {refused[0]}, which is not supported; set 'before' and 'after' of the class "
                    "instead"
                )
        try:
            manager = new_plugin_manager()
            manager.register(loaded, self.name)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise self.broken(str(error).replace("\n", " ")) from error
        return loaded

    def _check_contract(self, plugin: type[Plugin]) -> None:
        contracts = plugin.contracts
        if not isinstance(contracts, Set) or not all(type(each) is int for each in contracts):
            raise self.broken(f"has contracts {contracts!r}, which is not a set of integers, such as {{{CONTRACT}}}")
        if contracts and CONTRACT not in contracts:
            needed = " or ".join(map(str, sorted(contracts)))
            outdated = "arctic-plugins" if max(contracts) > CONTRACT else self.distribution
            raise self.broken(
                f"needs contract {needed}, but arctic-plugins {version('arctic-plugins')} has contract {CONTRACT}",
                fix=f"run 'pip install --upgrade {outdated}', or leave '{self.name}' out of the stack",
            )

    def broken(self, cause: str, fix: str = "") -> PluginLoadError:
        """Return the error of a plugin that cannot be used because of ``cause``."""
        return PluginLoadError(
            f"plugin '{self.name}' of distribution {self.distribution} {self.version} {cause}",
            fix=fix or f"repair or uninstall {self.distribution}, or leave '{self.name}' out of the stack",
        )


def installed_plugins() -> dict[str, list[InstalledPlugin]]:
    """Return name -> the installed distributions that provide it; several are an error once the name is enabled."""
    found: dict[str, list[InstalledPlugin]] = {}
    for entry_point in sorted(entry_points(group=PROJECT), key=lambda point: point.name):
        plugin = InstalledPlugin(entry_point.name, *identity(entry_point.dist), entry_point)
        if plugin not in (same_name := found.setdefault(entry_point.name, [])):
            same_name.append(plugin)
    return found


def load_plugin(name: str) -> type[Plugin]:
    """Import the plugin called ``name``.

    Raises:
        PluginNotFoundError: no distribution provides it; the message suggests the closest name.
        PluginError: two distributions provide it.
        PluginLoadError: see :meth:`InstalledPlugin.load`.
    """
    installed = installed_plugins()
    match installed.get(name, []):
        case []:
            raise PluginNotFoundError(
                f"plugin '{name}' is not installed",
                fix=f"{suggest(name, installed)}; 'arctic plugins' lists the installed plugins",
            )
        case [only]:
            return only.load()
        case several:
            owners = " and ".join(sorted(f"{plugin.distribution} {plugin.version}" for plugin in several))
            raise PluginError(
                f"plugin '{name}' is provided by {owners}", expected="one provider", fix="uninstall one of the two"
            )


def identity(distribution: Distribution | None) -> tuple[str, str]:
    """Return the name and version of an installed distribution, with stand-ins if its metadata is broken."""
    try:
        assert distribution is not None
        return distribution.metadata["Name"] or "unknown", distribution.version or "?"
    except Exception:  # importlib.metadata raises whatever its parser raises
        return Path(str(getattr(distribution, "_path", "unknown"))).name, "?"


class _PluginManager(pluggy.PluginManager):
    def __init__(self, only: Collection[str]) -> None:
        super().__init__(PROJECT)
        self.only = only
        self.add_hookspecs(hookspecs)

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        return super().parse_hookimpl_opts(plugin, name) if not self.only or name in self.only else None


def new_plugin_manager(only: Collection[str] = ()) -> pluggy.PluginManager:
    """Return a pluggy manager that knows the contract but no plugin.

    With ``only``, it takes plugin *classes*, of which it sees the class methods with these names.
    """
    return _PluginManager(only)


@functools.cache
def process_registry() -> Registry:
    """Return the registry of this process, filled by every installed plugin.

    If a plugin cannot be loaded or registered, its error is recorded in :attr:`Registry.failures` and raised when
    something that it may own is needed. ``process_registry.cache_clear()`` discards the registry.

    Raises:
        PluginError: two plugins register different things under one name; the message names both.
    """
    registry = Registry()
    for name, providers in installed_plugins().items():
        try:
            manager = new_plugin_manager(only=("register",))
            manager.register(load_plugin(name), name)
        except PluginError as error:
            registry.failures[name] = error
            continue
        try:
            manager.hook.register(registry=registry)
        except ArcticError:
            raise
        except Exception as error:  # a hook can raise anything, and all of it is reported
            registry.failures[name] = providers[0].broken(f"failed in register: {type(error).__name__}: {error}")
            continue
        registry.plugins.append(name)
    return registry
