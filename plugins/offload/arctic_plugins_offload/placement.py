"""The placement: which weights are moved off the device, and to which store."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from arctic_plugins.errors import ClaimError, ConfigError
from arctic_plugins.frozen import Buffers, Handle, Placement
from arctic_plugins_offload.config import OffloadConfig
from arctic_plugins_offload.disk import DiskStore
from arctic_plugins_offload.host import START, HostStore

__all__ = ["OffloadPlacement", "choose"]


class OffloadPlacement(Placement):
    """Placement that chooses weights by size, and passes them to a store in host memory or on disk.

    Args:
        options: the plugin's options.
        directory: the directory for the files of ``to: disk``.
    """

    def __init__(self, options: OffloadConfig, directory: Path) -> None:
        self.options, self.directory = options, directory
        ahead = None if options.prefetch == "auto" else options.prefetch
        self.store: HostStore | DiskStore = (
            DiskStore(directory, START if ahead is None else ahead) if options.to == "disk" else HostStore(ahead)
        )

    def plan(self, nbytes: Mapping[str, int]) -> dict[str, int]:
        """Choose the weights to move; none of their bytes stay on the device.

        Raises:
            ConfigError: the directory cannot be created, or its disk has too little space for these weights.
        """
        chosen = choose(nbytes, self.options)
        if self.options.to == "disk":
            self._check_room(sum(nbytes[name] for name in chosen))
        return dict.fromkeys(chosen, 0)

    def hold(self, name: str, buffers: Buffers, inner: Placement | None = None) -> Handle:
        if inner is not None:
            raise ClaimError(
                f"'{inner.describe()}' comes after 'offload', which leaves no bytes for it on the device",
                expected="'offload' as the last placement",
                fix="put that placement before it",
            )
        return self.store.hold(name, buffers)

    def describe(self) -> str:
        return f"on {self.options.to}" if self.options.to == "disk" else "in host memory"

    def _check_room(self, needed: int) -> None:
        existing = next(parent for parent in (self.directory, *self.directory.absolute().parents) if parent.exists())
        if not existing.is_dir():
            raise ConfigError(
                f"plugins.offload.path {self.directory}: {existing} is a file",
                expected="a directory",
                fix="set another path",
            )
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise ConfigError(
                f"plugins.offload.path {self.directory} has {free / 1e9:.1f} GB free",
                expected=f"{needed / 1e9:.1f} GB for the offloaded weights",
                fix="free space, set another path, or offload less",
            )


def choose(nbytes: Mapping[str, int], options: OffloadConfig) -> list[str]:
    """Return the names of the weights to move, in the order of the model.

    With ``ratio``, the moved bytes are as close to this fraction as whole weights allow. With ``budget``, at most that
    many bytes stay.
    """
    if isinstance(options.select, tuple):
        return list(nbytes)
    total = sum(nbytes.values())
    ratio = 1.0 if options.ratio is None else options.ratio
    wanted = total * ratio if options.budget is None else max(0, total - options.budget)
    order = list(nbytes) if options.select == "in_order" else _largest(nbytes)
    chosen, size = set(), 0
    for name in order:
        missing = wanted - size
        if missing <= 0 or (options.budget is None and missing < nbytes[name] / 2):
            break
        if (
            options.budget is not None and options.select == "largest"
        ):  # the last weight should not be larger than necessary
            name = min(
                (other for other in order if other not in chosen and nbytes[other] >= missing),
                key=lambda other: nbytes[other],
                default=name,
            )
        chosen.add(name)
        size += nbytes[name]
    return [name for name in nbytes if name in chosen]


def _largest(nbytes: Mapping[str, int]) -> list[str]:
    """Sort from large to small, and equal sizes so that the first n are spread over the model, for any n."""
    groups: dict[int, list[str]] = {}
    for name, size in nbytes.items():
        groups.setdefault(size, []).append(name)
    order = []
    for size in sorted(groups, reverse=True):
        names = groups[size]
        width = max(1, (len(names) - 1).bit_length())
        # van der Corput's sequence: positions sorted by their reversed bits
        order += [
            names[index] for index in sorted(range(len(names)), key=lambda index: int(f"{index:0{width}b}"[::-1], 2))
        ]
    return order
