"""Claims: which plugin wants which modules. All of them are gathered and checked before anything is modified."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

from arctic_plugins.errors import ClaimError
from arctic_plugins.host import hosts
from arctic_plugins.plugin import SLOTS, PluginConfig

__all__ = [
    "Claim",
    "LinearSpec",
    "ModulePatterns",
    "SettledClaims",
    "arbitrate",
    "check_patterns",
    "compress_names",
    "matches",
    "some",
]


@dataclass(frozen=True)
class LinearSpec:
    """A linear module as a host describes it before its weights exist: ``y_MN = x_MK @ weight_NK.T + bias_N``.

    The fused weights of a mixture's experts count as modules as well, under the name of the parameter
    (``model.layers.0.mlp.experts.down_proj``).
    """

    out_features: int
    """N."""
    in_features: int
    """K."""
    bias: bool = False
    """Whether it has a bias, ``[N]``."""
    tied: bool = False
    """Whether the weight is shared with another module (an ``lm_head`` tied to the embedding)."""
    experts: int | None = None
    """Number of matrices in the fused weight of a mixture, one for each expert; None for any other module."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, K)``, or ``(experts, N, K)``."""
        matrix = self.out_features, self.in_features
        return matrix if self.experts is None else (self.experts, *matrix)


@dataclass(frozen=True)
class Claim:
    """A plugin's request for ``value`` (a codec, a placement, ...) in ``slot`` of every module that matches ``module``.

    ``module`` is a dotted name. In it, ``*`` stands for any characters within one component and ``**`` for any
    characters.
    """

    slot: str
    """The name of a slot of modules; see :data:`arctic_plugins.SLOTS`."""
    module: str
    """A dotted name or a pattern."""
    value: Any
    """What fills the slot: a codec, a placement or a dispatch."""


@dataclass(frozen=True)
class SettledClaims:
    """The result of :func:`arbitrate`: slot -> module name -> the claimed values, in the order of the stack."""

    by_slot: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)

    def exclusive(self, slot: str) -> dict[str, Any]:
        """Return module name -> the only value in an exclusive slot."""
        return {name: values[0] for name, values in self.by_slot.get(slot, {}).items()}


@lru_cache(16384)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile ``pattern`` to a regular expression that never backtracks into what it has matched.

    ``fnmatch.translate`` (Python 3.13) works in the same way. The text between two ``**`` is matched where it first
    occurs, and so is the text between two ``*``: as ``*`` does not match a dot, a later occurrence leaves no more for
    the rest of the pattern. The text after the last ``**`` ends where the name ends, and is tried at every position.
    The time therefore grows at most with the square of the name's length, whatever the pattern.
    """
    *blocks, last = [block.split("*") for block in re.split(r"\*{2,}", pattern)]

    def found(parts: list[str]) -> str:
        first, *others = map(re.escape, parts)
        return first + "".join(f"(?>[^.]*?{other})" for other in others)

    *start, end = last
    ending = found(start) + f"[^.]*{re.escape(end)}" if start else re.escape(end)
    if not blocks:
        return re.compile(ending)
    return re.compile(found(blocks[0]) + "".join(f"(?>.*?{found(block)})" for block in blocks[1:]) + f".*{ending}")


def matches(pattern: str, name: str) -> bool:
    """Return whether the dotted ``name`` matches ``pattern`` (``*`` within one component, ``**`` across components)."""
    return _compiled(pattern).fullmatch(name) is not None


def check_patterns(option: str, patterns: Iterable[str], modules: Mapping[str, LinearSpec]) -> None:
    """Raise ClaimError unless each of the ``patterns`` matches a linear module; the message names the ``option``."""
    for pattern in patterns:
        if not any(matches(pattern, name) for name in modules):
            raise ClaimError(
                f"{option} '{pattern}' matches no linear module of this model", fix=f"the model has {some(modules)}"
            )


class ModulePatterns(PluginConfig):
    """Base of the options of plugins that encode weights: which modules are encoded."""

    include: tuple[str, ...] = ("**",)
    """Modules to encode, as dotted names with ``*`` (within a component) and ``**`` (across components)."""
    exclude: tuple[str, ...] = ("lm_head", "**.lm_head", "**.router", "**.gate", "**.shared_expert_gate", "score")
    """Modules to leave unchanged even if they are included. The default excludes output heads and routers."""

    def select(self, plugin: str, modules: Mapping[str, LinearSpec]) -> list[str]:
        """Return the names of the modules to encode.

        Args:
            plugin: name of the plugin with these options, for errors.
            modules: dotted name -> shape of every linear module of the model.

        Raises:
            ClaimError: a pattern of ``include`` that selects nothing, or a weight that is tied to the embedding.
        """
        check_patterns(f"plugins.{plugin}.include", self.include, modules)
        selected = [
            name
            for name in modules
            if any(matches(pattern, name) for pattern in self.include)
            and not any(matches(pattern, name) for pattern in self.exclude)
        ]
        if tied := [name for name in selected if modules[name].tied]:
            raise ClaimError(
                f"plugins.{plugin} includes {tied[0]}, whose weight is tied to the embedding",
                expected="an untied weight",
                fix="add it to 'exclude'",
            )
        for pattern in self.include:
            if selected and not any(matches(pattern, name) for name in selected):
                raise ClaimError(
                    f"plugins.{plugin}.include '{pattern}' matches only modules that 'exclude' removes again",
                    fix="set 'exclude' so that it does not match them",
                )
        return selected


def some(names: Iterable[str]) -> str:
    """Return the first three of ``names``, enough to recognize a model."""
    first = list(islice(names, 4))
    return ", ".join([*first[:3], *(["..."] if len(first) > 3 else [])]) or "none"


def arbitrate(claims: Iterable[tuple[str, Claim]], modules: Mapping[str, LinearSpec]) -> SettledClaims:
    """Expand patterns into names and settle which plugin gets which module.

    Args:
        claims: (plugin name, claim) in the order of the stack.
        modules: dotted name -> shape of every linear module of the model.

    Raises:
        ClaimError: an unknown slot; a pattern that matches no module; an exclusive slot that is claimed twice (the
            message names the module and both plugins); different codecs for modules that a host fuses; or a claim on
            only one of the two weights of a mixture's experts.
    """
    taken: dict[str, dict[str, list[tuple[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for plugin, claim in claims:
        if claim.slot not in (known := [name for name, slot in SLOTS.items() if slot.scope == "module"]):
            raise ClaimError(
                f"plugin '{plugin}' claims the unknown slot '{claim.slot}'", expected=f"one of {', '.join(known)}"
            )
        names = [claim.module] if claim.module in modules else [name for name in modules if matches(claim.module, name)]
        if not names:
            raise ClaimError(
                f"plugin '{plugin}' claims '{claim.module}', which matches no linear module of this model",
                fix="correct the pattern",
            )
        for name in names:
            owners = taken[claim.slot][name]
            if SLOTS[claim.slot].exclusive and owners and owners[0] != (plugin, claim.value):
                raise ClaimError(
                    f"plugins '{owners[0][0]}' and '{plugin}' both claim {name} as {claim.slot}",
                    expected="one plugin",
                    fix=f"change 'include' or 'exclude' of one of them, or remove '{owners[0][0]}' or '{plugin}'",
                )
            if (plugin, claim.value) not in owners:
                owners.append((plugin, claim.value))
    by_slot = {
        slot: {name: tuple(value for _, value in owners) for name, owners in named.items()}
        for slot, named in taken.items()
    }
    _check_fused(by_slot.get("weight_codec", {}), modules)
    return SettledClaims(by_slot)


def _check_fused(codecs: Mapping[str, tuple[Any, ...]], modules: Mapping[str, LinearSpec]) -> None:
    tables = [host.fused_siblings.items() for host in hosts().values()]
    fused = {(siblings, reader) for table in tables for reader, several in table for siblings in several}
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        for siblings, reader in sorted(fused):
            if leaf != siblings[0]:
                continue
            together = [f"{parent}.{sibling}" for sibling in siblings if f"{parent}.{sibling}" in modules]
            if len({codecs.get(sibling) for sibling in together}) > 1:
                raise ClaimError(
                    f"{' and '.join(together)} have different codecs, but {reader} fuses them into one module",
                    expected="one codec for all of them, or none",
                    fix="include or exclude them together",
                )
        if modules[name].experts is not None:
            together = [
                other
                for other, spec in modules.items()
                if spec.experts is not None and other.rpartition(".")[0] == parent
            ]
            if len({other in codecs for other in together}) > 1:
                raise ClaimError(
                    f"only one of {' and '.join(together)} is encoded",
                    expected="both weights of the experts to be encoded, or neither",
                    fix="include or exclude them together",
                )


def compress_names(owners: Mapping[str, str], modules: Iterable[str]) -> dict[str, str]:
    """Shorten ``owners`` (module name -> owner) by writing ``*`` for layer numbers.

    This is done where the result means the same for all ``modules``: ``model.layers.0.mlp.up_proj`` ...
    ``model.layers.29.mlp.up_proj`` become ``model.layers.*.mlp.up_proj``. Where the layers differ, their names stay as
    they are. No two patterns of the result match the same module.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in modules:
        groups[".".join("*" if part.isdigit() else part for part in name.split("."))].append(name)
    patterns: dict[str, str] = {}
    for pattern, names in groups.items():
        here = {owners.get(name) for name in names}
        if len(here) == 1 and (owner := here.pop()) is not None:
            patterns[pattern] = owner
        else:
            patterns.update({name: owners[name] for name in names if name in owners})
    return patterns
