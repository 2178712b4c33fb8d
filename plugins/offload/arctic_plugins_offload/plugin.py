"""The ``offload`` plugin: moves part of the frozen weights, of any codec, off the compute device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from arctic_plugins import Claim, LinearSpec, Plugin, cache_directory, check_patterns, hookimpl
from arctic_plugins_offload.config import OffloadConfig

__all__ = ["Offload"]

IN_MEMORY = ("tmpfs", "ramfs")


class Offload(Plugin):
    """Frozen weights in host memory or on disk; claims modules, among which it chooses once their sizes are known."""

    name = "offload"
    config = OffloadConfig
    slots = frozenset({"placement"})
    after = frozenset({"placement"})

    options: OffloadConfig

    @hookimpl
    def validate(self, hardware: str) -> Iterable[str]:
        if self.options.to == "host":
            if hardware == "cpu":
                return [
                    (
                        "without a GPU, 'to: host' moves nothing: the weights are in host memory anyway; use 'to: "
                        "disk' to move them out of it"
                    )
                ]
            return []
        found = file_system(self.directory())
        return (
            [f"{self.directory()} is on a {found}, whose files are in memory; set offload.path to a disk"]
            if found in IN_MEMORY
            else []
        )

    @hookimpl
    def claim(self, modules: Mapping[str, LinearSpec]) -> Iterable[Claim]:
        from arctic_plugins_offload.placement import OffloadPlacement

        placement = OffloadPlacement(self.options, self.directory() if self.options.to == "disk" else Path())
        patterns = self.options.select if isinstance(self.options.select, tuple) else ("**",)
        check_patterns("plugins.offload.select", patterns, modules)
        return [Claim("placement", pattern, placement) for pattern in patterns]

    def directory(self) -> Path:
        """Return the directory for the files."""
        return Path(self.options.path).expanduser() if self.options.path else cache_directory("offload")


def file_system(path: Path) -> str | None:
    """Return Linux's name for the type of the file system of ``path``, which need not exist; None if it is unknown."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return None
    inside = [(len(mount), kind) for _, mount, kind, *_ in mounts if path.resolve().is_relative_to(mount)]
    return max(inside)[1] if inside else None
