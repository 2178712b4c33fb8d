"""The ``deepspeed`` plugin: connects DeepSpeed to the Hugging Face host. It need not be enabled in a recipe."""

from __future__ import annotations

from arctic_plugins import Plugin, Registry, hookimpl
from arctic_plugins_deepspeed.config import DeepSpeedImport

__all__ = ["DeepSpeed"]


class DeepSpeed(Plugin):
    """Support for ``training.deepspeed``, ``arctic convert --from deepspeed`` and ``arctic train --hostfile``."""

    name = "deepspeed"

    @classmethod
    @hookimpl
    def register(cls, registry: Registry) -> None:
        package = "arctic_plugins_deepspeed"
        registry.trainer_engine("deepspeed", f"{package}.engine:ZeRO")
        registry.importer("deepspeed", f"{package}.checkpoints:convert_deepspeed", DeepSpeedImport)
        registry.host_launcher(f"{package}.launch:launch_on_hosts")
        registry.environment(f"{package}.launch:accelerator")
