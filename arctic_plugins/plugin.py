"""What a plugin is: a class with a name, a validated config, the slots it fills and its hook implementations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pluggy
from pydantic import BaseModel, ConfigDict, ValidationError

from arctic_plugins.errors import ConfigError, suggest
from arctic_plugins.processes import world_size

__all__ = [
    "CONTRACT",
    "PROJECT",
    "SLOTS",
    "THIS_MACHINE",
    "Finding",
    "Plugin",
    "PluginConfig",
    "Slot",
    "hookimpl",
]

PROJECT = "arctic_plugins"
"""The pluggy project name, and the entry-point group in which distributions list their plugins."""

CONTRACT = 1
"""The version of the contract between this project and plugins.

It rises only in a release in which a plugin that works with the previous version could break. What is added to the
contract does not raise it. ``docs/contract.md`` describes the policy.
"""

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a method of a plugin as an implementation of the hook of the same name."""


@dataclass(frozen=True)
class Slot:
    """A role in a model that plugins fill. A part of a stack may leave out some slots of a plugin and keep others."""

    scope: Literal["module", "model"]
    """``module``: filled for each module separately, by a :class:`~arctic_plugins.claims.Claim` or by what an adapter
    targets; ``model``: filled once.
    """
    exclusive: bool
    """Whether only one plugin can fill it for a module, or for the model."""
    training_only: bool = False
    """Whether a model that is not trained works without it."""
    hooks: frozenset[str] = frozenset()
    """The hooks that fill it, if claims do not.

    They are not called if the slot is left out. A plugin's mixins go with ``hf_attach_trainer``.
    """


_TRAINING_HOOKS = frozenset({"hf_transform_model", "hf_attach_trainer"})

SLOTS: Mapping[str, Slot] = {
    "weight_codec": Slot("module", exclusive=True),
    "experts_dispatch": Slot("module", exclusive=True, training_only=True),
    "placement": Slot("module", exclusive=False),
    "adapter": Slot("module", exclusive=False, hooks=frozenset({"hf_transform_model", "vllm_engine_args"})),
    "rope": Slot("model", exclusive=True, hooks=frozenset({"hf_configure_model"})),
    "loss": Slot("model", exclusive=True, training_only=True, hooks=_TRAINING_HOOKS),
    "attention": Slot("model", exclusive=True, training_only=True, hooks=_TRAINING_HOOKS),
}
"""All slots by name. :attr:`Plugin.slots` and claims use these names. Two plugins that fill the same exclusive slot of
the model cannot be in one stack. docs/how-it-works.md describes what fills each slot.
"""

THIS_MACHINE = "this machine"
"""Marks an option that names a path, a device, a host or a number of processes: ``path: Annotated[str | None,
THIS_MACHINE] = None``. Only the user's recipe sets it. It is never taken from a checkpoint, whose source may be
untrusted."""


class PluginConfig(BaseModel):
    """Base class of a plugin's options: immutable, and an unknown key is an error.

    ``arctic plugins NAME`` shows the text under a field as its description. Fields marked with :data:`THIS_MACHINE`
    need a default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def anywhere(self) -> dict[str, Any]:
        """Return the options that were set, except those marked with :data:`THIS_MACHINE`.

        .. versionadded:: 0.1
        """
        local = {name for name, field in type(self).model_fields.items() if THIS_MACHINE in field.metadata}
        return self.model_dump(exclude_unset=True, exclude=local)


class Plugin:
    """Base class of every plugin. Keep the module that defines one light: import torch and hosts inside functions.

    Subclasses set the class attributes and implement hooks of :mod:`arctic_plugins.hookspecs` as methods marked with
    :data:`hookimpl`. ``requires``, ``conflicts``, ``after`` and ``before`` contain names of plugins or of slots. The
    name of a slot means any plugin that fills it, so that a plugin need not know which one that is.
    """

    name: ClassVar[str]
    """The key under ``plugins`` in a recipe, and the name of the entry point.

    .. versionadded:: 0.1
    """
    config: ClassVar[type[PluginConfig]] = PluginConfig
    """The class of its options.

    .. versionadded:: 0.1
    """
    slots: ClassVar[frozenset[str]] = frozenset()
    """The roles that it fills in a model: names of :data:`SLOTS`.

    .. versionadded:: 0.1
    """
    contracts: ClassVar[frozenset[int]] = frozenset()
    """The versions of the contract with which it works, for example ``{1, 2}``; empty means any.

    If :data:`CONTRACT` is not among them, the plugin is not loaded.

    .. versionadded:: 0.1
    """
    hosts: ClassVar[Mapping[str, str]] = {}
    """Name of a host (:attr:`arctic_plugins.host.Host.name`) -> PEP 440 range, if it is narrower than that of this
    project's integration, for example ``{"transformers": ">=5.18"}``.

    .. versionadded:: 0.1
    """
    requires: ClassVar[frozenset[str]] = frozenset()
    """What must also be in the stack.

    .. versionadded:: 0.1
    """
    conflicts: ClassVar[frozenset[str]] = frozenset()
    """What cannot be in the same stack.

    .. versionadded:: 0.1
    """
    after: ClassVar[frozenset[str]] = frozenset()
    """What precedes it in the stack, if it is there.

    .. versionadded:: 0.1
    """
    before: ClassVar[frozenset[str]] = frozenset()
    """What follows it in the stack, if it is there.

    .. versionadded:: 0.1
    """
    options: PluginConfig
    """Its validated options, an instance of :attr:`config`.

    .. versionadded:: 0.1
    """

    def __init__(self, options: PluginConfig) -> None:
        self.options = options

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Plugin:
        """Validate ``options`` and build the plugin.

        Raises:
            ConfigError: an unknown key (the message suggests the closest known one), or a wrong type or value.

        .. versionadded:: 0.1
        """
        if options is not None and not isinstance(options, Mapping):
            raise ConfigError(
                f"plugins.{cls.name} is {options!r}",
                expected="a mapping of options",
                fix=f"write '{cls.name}: {{}}' for the defaults",
            )
        try:
            return cls(cls.config.model_validate(dict(options or {})))
        except ValidationError as error:
            raise config_error(error, f"plugins.{cls.name}", cls.config) from error

    @property
    def trainer_mixins(self) -> tuple[str, ...]:
        """Classes, as ``"module:attribute"``, that ``attach`` puts in front of the class of a Hugging Face Trainer.

        Each overrides methods of ``transformers.Trainer`` and calls ``super()``. It may have a method
        ``on_attach(self, plugin)``, which is called once with this plugin when the trainer has its new class.

        .. versionadded:: 0.1
        """
        return ()

    @property
    def row_processes(self) -> int:
        """Number of processes that work on one row of the data together.

        A plugin that splits rows overrides it: a run then takes that many times more steps.

        .. versionadded:: 0.1
        """
        return 1

    def check_processes(self, option: str) -> None:
        """Raise ConfigError unless the processes can be divided into groups of the size that ``option`` specifies.

        Call it in a ``validate`` hook.

        .. versionadded:: 0.1
        """
        size, group = world_size(), getattr(self.options, option)
        if size % group:
            raise ConfigError(
                f"plugins.{self.name}.{option} is {group} with {size} process{'es' if size > 1 else ''}",
                expected="a divisor of the number of processes",
                fix=f"start several with 'arctic train RECIPE --nproc {group}', torchrun or accelerate launch, or "
                "correct the value",
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.options!r})"


@dataclass(frozen=True)
class Finding:
    """The result of one check of ``arctic doctor``."""

    status: Literal["ok", "warning", "error"]
    """``error``: something enabled or installed does not work. ``warning``: something may be slower or is not
    available. ``ok``: everything is as it should be.
    """
    subject: str
    """What was checked, in a few words."""
    text: str
    """What was found, and what was expected."""
    fix: str = ""
    """What the user can do."""


def expectation(error: ValidationError) -> str:
    """Return what pydantic expected where it found the first problem, without its own introductions."""
    message: str = error.errors()[0]["msg"]
    return message.removeprefix("Value error, ").removeprefix("Input should be ")


_BRANCH = re.compile(r"(constrained-)?(str|int|float|bool)|(tuple|list|dict|function-[\w-]+)\[.*\]|\[key\]")
"""What pydantic adds to the path of a value that may have one of several types, or that is a key."""


def config_error(error: ValidationError, where: str, model: type[BaseModel]) -> ConfigError:
    """Turn pydantic's report into one line about its first problem; ``where`` is the key that contains the options."""
    first = error.errors()[0]
    key = ".".join([where, *(str(part) for part in first["loc"] if not _BRANCH.fullmatch(str(part)))])
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{key} is not an option", fix=suggest(str(first["loc"][-1]), model.model_fields))
    if first["type"] == "missing":
        return ConfigError(f"{key} is missing", fix="add it")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return ConfigError(f"{key} is {first['input']!r}", expected=expectation(error) + more, fix="correct the value")
