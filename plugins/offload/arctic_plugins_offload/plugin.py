"""The ``offload`` plugin: part of the frozen weights leaves the compute device, whichever codec encodes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from arctic_plugins import Claim, LinearSpec, Plugin, cache_directory, check_patterns, hookimpl
from arctic_plugins_offload.config import OffloadConfig

__all__ = ["Offload"]

IN_MEMORY = ("tmpfs", "ramfs")


class Offload(Plugin):
    """Claims ``placement`` of the modules among which it will choose when their sizes are known."""

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
                        "without a GPU, 'to: host' moves nothing: the weights are in the host's memory anyway; 'to: "
                        "disk' takes them out of it"
                    )
                ]
            return []
        found = file_system(self.directory())
        return (
            [f"{self.directory()} is a {found}: its files are in memory; set offload.path to a disk"]
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
        """Where files go."""
        return Path(self.options.path).expanduser() if self.options.path else cache_directory("offload")


def file_system(path: Path) -> str | None:
    """The type of the file system that ``path`` is or will be on, as Linux names it; None where that cannot be told."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return None
    inside = [(len(mount), kind) for _, mount, kind, *_ in mounts if path.resolve().is_relative_to(mount)]
    return max(inside)[1] if inside else None
