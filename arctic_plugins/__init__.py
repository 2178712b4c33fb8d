"""arctic-plugins: interchangeable parts that extend the Hugging Face Trainer and vLLM. Importing this loads no torch
and no host.
"""

from arctic_plugins.claims import Claim, LinearSpec
from arctic_plugins.errors import ArcticError, UserError
from arctic_plugins.plugin import Finding, Plugin, PluginConfig, hookimpl
from arctic_plugins.recorded import stack_from_checkpoint
from arctic_plugins.registry import ModelClasses, Registry
from arctic_plugins.stack import Stack

__all__ = [
    "ArcticError",
    "Claim",
    "Finding",
    "LinearSpec",
    "ModelClasses",
    "Plugin",
    "PluginConfig",
    "Registry",
    "Stack",
    "UserError",
    "hookimpl",
    "stack_from_checkpoint",
]
