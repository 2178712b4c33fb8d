"""arctic-plugins: interchangeable parts that extend the Hugging Face Trainer and vLLM. Importing this loads no torch
and no host.
"""

from arctic_plugins.claims import Claim, LinearSpec
from arctic_plugins.errors import ArcticError, UserError
from arctic_plugins.host import Host
from arctic_plugins.plugin import SLOTS, Finding, Plugin, PluginConfig, Slot, hookimpl
from arctic_plugins.recorded import stack_from_checkpoint
from arctic_plugins.registry import ModelClasses, Registry
from arctic_plugins.stack import Stack

__all__ = [
    "SLOTS",
    "ArcticError",
    "Claim",
    "Finding",
    "Host",
    "LinearSpec",
    "ModelClasses",
    "Plugin",
    "PluginConfig",
    "Registry",
    "Slot",
    "Stack",
    "UserError",
    "hookimpl",
    "stack_from_checkpoint",
]
