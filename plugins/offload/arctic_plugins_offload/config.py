"""Options of the ``offload`` plugin."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ByteSize, Field, field_serializer, model_validator

from arctic_plugins import THIS_MACHINE, PluginConfig

__all__ = ["OffloadConfig"]


class OffloadConfig(PluginConfig):
    """Options under ``offload:`` in a recipe. Sizes refer to the frozen, encoded weights of one process."""

    ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """Fraction of the bytes to move off the device. Left out together with ``budget``: all."""
    budget: ByteSize | None = None
    """Bytes that may stay on the device (``60GiB``, ``500MB``), instead of ``ratio``; no more than necessary is moved.
    """
    select: Literal["largest", "in_order"] | tuple[str, ...] = "largest"
    """Which weights move first: the largest, spread evenly over the model; those that come first in the model; or
    exactly the modules that match these patterns (``*`` within a component, ``**`` across components)."""
    to: Literal["host", "disk"] = "host"
    """``host``: pinned memory, copied to the device ahead of use. ``disk``: mapped files, read ahead of use and dropped
    from memory after it; also works without a GPU."""
    path: Annotated[str | None, THIS_MACHINE] = None
    """Directory for the files of ``disk``, on a local disk, not on a file system in memory. Left out:
    ``~/.cache/arctic_plugins/offload``.
    """
    prefetch: Literal["auto"] | Annotated[int, Field(ge=0, le=64)] = "auto"
    """Number of weights to fetch ahead of use. ``auto``: 2 with ``disk``; with ``host``, as many as it takes to
    hide the copies, measured during the first steps."""

    @model_validator(mode="after")
    def _check(self) -> OffloadConfig:
        if self.ratio is not None and self.budget is not None:
            raise ValueError("ratio and budget are mutually exclusive")
        if isinstance(self.select, tuple) and (self.ratio is not None or self.budget is not None):
            raise ValueError("select with patterns determines what moves and cannot be combined with ratio or budget")
        if self.path is not None and self.to == "host":
            raise ValueError("path requires 'to: disk'")
        return self

    @field_serializer("budget")
    def _plain_bytes(self, budget: ByteSize | None) -> int | None:
        return None if budget is None else int(budget)
