"""A stack: the enabled plugins, resolved and ordered, with typed calls of their hooks."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy
import yaml

from arctic_plugins.claims import LinearSpec, SettledClaims, arbitrate, some
from arctic_plugins.discovery import load_plugin, new_plugin_manager
from arctic_plugins.errors import ArcticError, ClaimError, ConfigError, PluginError
from arctic_plugins.plugin import SLOTS, Plugin
from arctic_plugins.provenance import stack_sha256
from arctic_plugins.resolver import check_hosts, resolve

__all__ = ["Setting", "Stack", "parse_plugins", "read_yaml"]

logger = logging.getLogger(__name__)


_MODEL_HOOKS = frozenset({"claim", "hf_configure_model", "hf_transform_model"})


@dataclass(frozen=True)
class Setting:
    """One option of one plugin, and its source: ``"recipe"`` or ``"default"``."""

    plugin: str
    key: str
    value: Any
    source: str


class Stack:
    """An immutable, ordered set of plugins.

    Build one with :meth:`from_dict`, :meth:`from_file` or :func:`arctic_plugins.stack_from_checkpoint`. Iterating over
    it gives the plugins in the order in which their hooks are called. A part of a stack, from :meth:`only` or
    :meth:`without`, may contain a plugin without using every slot of it.

    Args:
        plugins: in any order.
        hidden: name of a plugin -> slots that it fills and that are ignored here.
    """

    def __init__(self, plugins: tuple[Plugin, ...] = (), hidden: Mapping[str, frozenset[str]] | None = None) -> None:
        self.plugins = resolve(plugins)
        self._hidden = {
            plugin.name: plugin.slots & (hidden or {}).get(plugin.name, frozenset()) for plugin in self.plugins
        }
        self._manager = new_plugin_manager()
        for plugin in self.plugins:
            self._manager.register(plugin, plugin.name)
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(
                f"plugin '{getattr(error.plugin, 'name', error.plugin)}': {error}",
                fix="its hooks are not those of this version of arctic-plugins",
            ) from error

    @classmethod
    def from_dict(cls, plugins: Mapping[str, Mapping[str, Any] | None] | None) -> Stack:
        """Load, configure and resolve ``plugins`` (name -> options, as under ``plugins:`` in a recipe).

        Raises:
            PluginNotFoundError, PluginLoadError, ConfigError, ResolveError: each message says in one line what to do.
        """
        if plugins is not None and not isinstance(plugins, Mapping):
            raise ConfigError(
                f"plugins is {plugins!r}",
                expected="a mapping of plugin names to options",
                fix="write 'plugins: {fp8: {bits: 8}}'",
            )
        return cls(tuple(load_plugin(name).from_options(options) for name, options in (plugins or {}).items()))

    @classmethod
    def from_file(cls, path: str | Path) -> Stack:
        """Read the key ``plugins`` of a YAML or JSON file, for example a recipe."""
        return cls.from_dict(read_yaml(path).get("plugins"))

    def __iter__(self) -> Iterator[Plugin]:
        return iter(self.plugins)

    def __len__(self) -> int:
        return len(self.plugins)

    def __contains__(self, name: object) -> bool:
        return any(plugin.name == name for plugin in self.plugins)

    def __repr__(self) -> str:
        return f"Stack({', '.join(plugin.name for plugin in self.plugins)})"

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the canonical form: every option spelled out, plugins in alphabetical order, JSON types only."""
        return {
            plugin.name: plugin.options.model_dump(mode="json")
            for plugin in sorted(self.plugins, key=lambda plugin: plugin.name)
        }

    def sha256(self) -> str:
        """Return the hex digest of the canonical form. It is equal for stacks that do the same."""
        return stack_sha256(self.to_dict())

    def settings(self) -> list[Setting]:
        """Return every option of every plugin, with its source."""
        return [
            Setting(plugin.name, key, value, "recipe" if key in plugin.options.model_fields_set else "default")
            for plugin in self.plugins
            for key, value in plugin.options
        ]

    def only(self, slot: str) -> Stack:
        """Return the part of this stack that fills ``slot``."""
        filling = tuple(plugin for plugin in self.plugins if slot in self.slots(plugin))
        return Stack(filling, {plugin.name: plugin.slots - {slot} for plugin in filling})

    def without(self, *slots: str) -> Stack:
        """Return this stack without what fills ``slots``. A plugin that also fills other slots stays for those."""
        hidden = self._all(*slots)
        return Stack(
            tuple(plugin for plugin in self.plugins if not plugin.slots or plugin.slots - hidden[plugin.name]), hidden
        )

    def to_use(self) -> Stack:
        """Return this stack without what only training needs (:attr:`~arctic_plugins.plugin.Slot.training_only`)."""
        return self.without(*(name for name, slot in SLOTS.items() if slot.training_only))

    def anywhere(self) -> Stack:
        """Return this stack without anything that concerns the machine.

        It has no placements, and options marked with :data:`~arctic_plugins.plugin.THIS_MACHINE` have their defaults.
        """
        kept = self.without("placement")
        return Stack(tuple(plugin.from_options(plugin.options.anywhere()) for plugin in kept), kept._hidden)

    def plus(self, other: Stack) -> Stack:
        """Return both stacks as one.

        Raises:
            ConfigError: a plugin is in both.
        """
        if shared := sorted({plugin.name for plugin in self} & {plugin.name for plugin in other}):
            raise ConfigError(
                f"plugin '{shared[0]}' is enabled twice: by the checkpoint and in addition to it",
                fix="enable only what the checkpoint does not",
            )
        return Stack((*self, *other), {**self._hidden, **other._hidden})

    def updated(self, other: Stack) -> Stack:
        """Return both stacks as one, with the plugins of ``other`` in place of those of the same name.

        .. versionadded:: 0.1
        """
        names = {plugin.name for plugin in other}
        kept = tuple(plugin for plugin in self if plugin.name not in names)
        return Stack((*kept, *other), {**self._hidden, **other._hidden})

    def of_model(self) -> Stack:
        """Return the part of this stack that concerns the model: plugins that fill a slot or change models otherwise.

        The rest only configures a host.

        .. versionadded:: 0.1
        """
        kept = tuple(plugin for plugin in self.plugins if plugin.slots or self._implements(plugin, _MODEL_HOOKS))
        return Stack(kept, self._hidden)

    def _implements(self, plugin: Plugin, hooks: frozenset[str]) -> bool:
        callers = self._manager.get_hookcallers(plugin) or ()
        return any(caller.name in hooks for caller in callers)

    def slots(self, plugin: Plugin) -> frozenset[str]:
        """Return the slots of ``plugin`` that this stack uses."""
        return plugin.slots - self._hidden[plugin.name]

    def _all(self, *slots: str) -> dict[str, frozenset[str]]:
        return {plugin.name: self._hidden[plugin.name] | plugin.slots & frozenset(slots) for plugin in self.plugins}

    # Typed calls of the hooks, in lifecycle order. Nothing else in the project calls one of these hooks.

    def check_host(self, host: str) -> None:
        """Check that ``host`` is installed in the range of every plugin.

        Raises:
            HostVersionError: it is not; see :func:`arctic_plugins.resolver.check_hosts`.
        """
        check_hosts(self.plugins, host)

    def validate(self, model_config: Any, hardware: str) -> list[str]:
        """Call ``validate`` and return the warnings, each after its plugin's name."""
        results = self._each("validate", stack=self, model_config=model_config, hardware=hardware)
        return [f"{plugin.name}: {warning}" for plugin, warnings in results for warning in warnings]

    def claim(self, model_config: Any, modules: Mapping[str, LinearSpec]) -> SettledClaims:
        """Gather every plugin's claims and settle them; see :func:`arctic_plugins.claims.arbitrate`.

        Raises:
            ClaimError: see there; or a plugin that encodes or places weights claims nothing, although whoever enabled
                it relies on it.
        """
        results = self._each("claim", model_config=model_config, modules=modules)
        made = [(plugin, claim) for plugin, claims in results for claim in claims]
        for plugin in self.plugins:
            if {"weight_codec", "placement"} & plugin.slots and not any(owner is plugin for owner, _ in made):
                raise ClaimError(
                    f"plugin '{plugin.name}' claims nothing in this model, whose linear modules are {some(modules)}",
                    expected="at least one weight; layers of other classes, such as GPT-2's Conv1D, cannot be claimed",
                    fix=f"remove '{plugin.name}', or correct its options",
                )
        claims = arbitrate(
            [(plugin.name, claim) for plugin, claim in made if claim.slot not in self._hidden[plugin.name]], modules
        )
        for slot, named in claims.by_slot.items():
            for name, values in named.items():
                logger.debug("%s: %s <- %s", name, slot, values)
        return claims

    def hf_configure_model(self, config: Any) -> None:
        """Call the hook of every plugin."""
        for _ in self._each("hf_configure_model", config=config):
            pass

    def hf_transform_model(self, model: Any) -> Any:
        """Call every plugin on ``model`` in turn; each receives what the one before it returned."""
        for plugin in self.plugins:
            for _, changed in self._each("hf_transform_model", only=plugin, model=model):
                model = changed
        return model

    def hf_training_arguments(self, args: Any) -> None:
        """Call the hook of every plugin."""
        for _ in self._each("hf_training_arguments", args=args):
            pass

    def hf_attach_trainer(self, trainer: Any) -> None:
        """Call the hook of every plugin."""
        for _ in self._each("hf_attach_trainer", trainer=trainer):
            pass

    def trainer_mixins(self) -> list[tuple[str, Plugin]]:
        """Return each plugin's :attr:`~arctic_plugins.plugin.Plugin.trainer_mixins`, each with its plugin, in order."""
        return [
            (target, plugin)
            for plugin in self.plugins
            if not any("hf_attach_trainer" in SLOTS[slot].hooks for slot in self._hidden[plugin.name])
            for target in plugin.trainer_mixins
        ]

    def vllm_engine_args(self, checkpoint: Path) -> dict[str, Any]:
        """Merge every plugin's engine arguments.

        Raises:
            PluginError: two plugins set the same key to different values; the message names both.
        """
        merged: dict[str, Any] = {}
        owner: dict[str, str] = {}
        for plugin, arguments in self._each("vllm_engine_args", checkpoint=checkpoint):
            for key, value in arguments.items():
                if merged.setdefault(key, value) != value:
                    raise PluginError(
                        f"plugins '{owner[key]}' and '{plugin.name}' set the engine argument '{key}' to "
                        f"{merged[key]!r} and {value!r}",
                        fix=f"pass --{key.replace('_', '-')} yourself, or remove one of the two",
                    )
                owner[key] = plugin.name
        return merged

    def vllm_check(self, arguments: Mapping[str, Any], model_config: Mapping[str, Any]) -> None:
        """Let every plugin refuse what cannot be done with these engine arguments; see the hook of the same name.

        Raises:
            UserError: a plugin's reason, in one line.

        .. versionadded:: 0.1
        """
        for _ in self._each("vllm_check", arguments=arguments, model_config=model_config):
            pass

    def _each(self, hook: str, *, only: Plugin | None = None, **arguments: Any) -> Iterator[tuple[Plugin, Any]]:
        """Call ``hook`` of every plugin, one after another, in order.

        Yields:
            (plugin, result) for every result that is not None.
        """
        for plugin in self.plugins if only is None else (only,):
            if any(hook in SLOTS[slot].hooks for slot in self._hidden[plugin.name]):
                continue
            others = [other for other in self.plugins if other is not plugin]
            try:
                results = self._manager.subset_hook_caller(hook, others)(**arguments)
            except ArcticError:
                raise
            except Exception as error:
                raise PluginError(
                    f"plugin '{plugin.name}' failed in {hook}: {type(error).__name__}: {error}",
                    fix=f"report it to the authors of '{plugin.name}'",
                ) from error
            yield from ((plugin, result) for result in results)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a duplicated key in a mapping, for which YAML would use the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a list or mapping is used as a key", key.start_mark
                )
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is duplicated", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML (or JSON) file whose top level is a mapping.

    Raises:
        ConfigError: the file is absent, unreadable, malformed (with line and column), or not a mapping.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", expected="a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # PyYAML raises ValueErrors for impossible dates
        raise ConfigError(f"{path} is not valid YAML: {error}", fix="correct the line it names") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} has the top-level type {type(data).__name__}", expected="a mapping")
    return data


def parse_plugins(text: str) -> dict[str, Any]:
    """Return a command line's ``"fp8,lora"`` or ``'{"fp8": {"bits": 8}}'`` as a mapping of plugin names to options.

    Raises:
        ConfigError: JSON that is malformed or not an object.
    """
    if not text.lstrip().startswith("{"):
        return {name.strip(): {} for name in text.split(",") if name.strip()}
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise ConfigError(
            f"plugins {text!r} is not valid JSON: {error}", expected='an object such as \'{"fp8": {"bits": 8}}\''
        ) from error
