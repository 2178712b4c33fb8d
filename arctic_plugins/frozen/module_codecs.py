"""Which codec each module of a checkpoint has: ``quantization_config`` in ``config.json``, for every host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from arctic_plugins.claims import compress_names, matches
from arctic_plugins.errors import CheckpointError
from arctic_plugins.frozen.codec import Codec, codec_from_dict, codec_to_dict
from arctic_plugins.provenance import FORMAT

__all__ = ["METHOD", "ModuleCodecs"]

METHOD = "arctic"
"""The ``quant_method`` of every checkpoint that this project encodes."""

MOST_PATTERNS, LONGEST_PATTERN, MOST_CHARACTERS = 10_000, 1_000, 200_000
"""Limits on the patterns in a checkpoint, above what this project writes."""

_KEYS = frozenset({"quant_method", "format", "codecs", "modules"})


class ModuleCodecs:
    """The codecs of a checkpoint's modules, checked.

    In a config: ``{quant_method: arctic, format: 1, codecs: {id: {type: fp8, ...}}, modules: {pattern: id}}``.

    Args:
        codecs: id -> codec.
        modules: pattern of dotted names (``*`` within a component) -> id. No two patterns match the same module.
    """

    def __init__(self, codecs: Mapping[str, Codec], modules: Mapping[str, str]) -> None:
        self.codecs, self.modules = dict(codecs), dict(modules)
        self._patterns = {pattern: name for pattern, name in self.modules.items() if "*" in pattern}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModuleCodecs:
        """Read a checkpoint's ``quantization_config``.

        Raises:
            CheckpointError: a newer format, an unknown key, a module with an unknown id, or a codec with bad fields.
            PluginNotFoundError: no installed plugin provides a codec's type.
        """
        version, codecs, modules = (config.get(key) for key in ("format", "codecs", "modules"))
        if type(version) is int and version > FORMAT:
            raise CheckpointError(
                f"quantization_config has format {version}", expected=f"at most {FORMAT}", fix="upgrade arctic-plugins"
            )
        if unknown := sorted(config.keys() - _KEYS):
            raise CheckpointError(f"quantization_config has the unknown keys {unknown}", fix="upgrade arctic-plugins")
        if type(version) is not int or version < 1:
            raise _malformed("format", version, "a positive integer")
        if not (isinstance(codecs, Mapping) and all(isinstance(codec, Mapping) for codec in codecs.values())):
            raise _malformed("codecs", codecs, "an object of id -> {type: ...}")
        if not (isinstance(modules, Mapping) and all(isinstance(name, str) for name in modules.values())):
            raise _malformed("modules", modules, "an object of module name -> codec id")
        patterns = [name for name in modules if "*" in name]
        characters = sum(map(len, patterns))
        if (
            len(patterns) > MOST_PATTERNS
            or characters > MOST_CHARACTERS
            or any(len(name) > LONGEST_PATTERN for name in patterns)
        ):
            longest = max(map(len, patterns))
            raise CheckpointError(
                f"quantization_config.modules has {len(patterns)} patterns of up to {longest} characters, "
                f"{characters} in total",
                expected=f"at most {MOST_PATTERNS} of {LONGEST_PATTERN}, {MOST_CHARACTERS} in total",
                fix="create the checkpoint again",
            )
        built = {name: codec_from_dict(codec) for name, codec in codecs.items()}
        if missing := sorted(set(modules.values()) - codecs.keys()):
            raise CheckpointError(
                f"quantization_config.modules names the codecs {missing}",
                expected=f"one of {sorted(codecs)}",
                fix="create the checkpoint again",
            )
        return cls(built, modules)

    @classmethod
    def from_owners(cls, owners: Mapping[str, Codec], modules: Iterable[str]) -> ModuleCodecs:
        """Build it from module name -> codec, with as few patterns as possible.

        The patterns give each of ``modules`` (the names of all linear modules) the same codec as before.
        """
        ids: dict[Codec, str] = {}
        for codec in owners.values():
            if codec not in ids:
                count = sum(other.type == codec.type for other in ids)
                ids[codec] = f"{codec.type}_{count + 1}" if count else codec.type
        named = {name: ids[codec] for name, codec in owners.items()}
        return cls({name: codec for codec, name in ids.items()}, compress_names(named, modules))

    def to_config(self) -> dict[str, Any]:
        """Return what :meth:`from_config` reads; JSON types only."""
        codecs = {name: codec_to_dict(codec) for name, codec in self.codecs.items()}
        return {"quant_method": METHOD, "format": FORMAT, "codecs": codecs, "modules": dict(self.modules)}

    def codec_of(self, module: str) -> Codec | None:
        """Return the codec of the module with this dotted name, or None if it is not encoded."""
        matching = (name for pattern, name in self._patterns.items() if matches(pattern, module))
        named = self.modules[module] if module in self.modules else next(matching, None)
        return None if named is None else self.codecs[named]


def _malformed(key: str, found: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"quantization_config.{key} is {found!r}", expected=expected, fix="create the checkpoint again"
    )
