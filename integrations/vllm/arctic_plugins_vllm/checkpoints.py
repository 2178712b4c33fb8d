"""What a checkpoint is to vLLM: how it is encoded, and what it needs in its config."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from arctic_plugins.errors import CheckpointError, ConfigError, PluginNotFoundError
from arctic_plugins.frozen import METHOD, ModuleCodecs
from arctic_plugins.host import service
from arctic_plugins.provenance import FILE_NAME
from arctic_plugins.recorded import stack_from_checkpoint
from arctic_plugins.stack import Stack
from arctic_plugins_vllm.adapters import Adapter

__all__ = ["ON_THE_FLY", "check_names", "encoding_of", "made_for", "method_of", "needed_overrides", "on_the_fly"]

ON_THE_FLY = "on_the_fly"
"""Key of a ``quantization_config`` whose weights are plain in the checkpoint, and encoded while they are loaded."""


def on_the_fly(checkpoint: str, stack: Stack, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return ``hf_overrides`` for ``LLM``, with which vLLM encodes the plain ``checkpoint`` while loading it.

    It is encoded as ``stack`` specifies. ``trust_remote_code`` allows to execute the checkpoint's own code, if its
    model needs it.

    Raises:
        ConfigError: arctic-plugins-huggingface is not installed, the checkpoint is already quantized, or ``stack``
            changes nothing.
        ClaimError: plugins claim the same module.
    """
    planned_config = _service("planned_config")
    overrides: dict[str, Any] = planned_config(checkpoint, stack, trust_remote_code=trust_remote_code)
    if "quantization_config" in overrides:
        overrides["quantization_config"] = {**overrides["quantization_config"], ON_THE_FLY: True}
    return overrides


def needed_overrides(adapter: Adapter, model: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return ``hf_overrides`` for the base model of ``adapter``: what a merged checkpoint would have in its config.

    Raises:
        ConfigError: arctic-plugins-huggingface, which works them out, is not installed.
    """
    if not len(adapter.changes):
        return {}
    config = _service("load_config")(str(model), trust_remote_code=trust_remote_code)
    overrides: dict[str, Any] = _service("configured")(config, adapter.changes)
    return overrides


def encoding_of(model: Path, config: Mapping[str, Any], plugins: Stack | None = None) -> dict[str, Any] | None:
    """Return the plugins that encode the weights of a model: name -> options.

    Args:
        model: directory or Hub id.
        config: its ``config.json``.
        plugins: those that encode it while it is loaded.

    Returns:
        Empty if its weights are plain, None if it is encoded and there is no record of how.
    """
    if plugins is not None and len(encoding := plugins.only("weight_codec")):
        return encoding.to_dict()
    if method_of(config) != METHOD:
        return {}
    return stack_from_checkpoint(model).only("weight_codec").to_dict() if (model / FILE_NAME).is_file() else None


def method_of(config: Mapping[str, Any]) -> Any:
    """Return the quantization method in a ``config.json``, if any."""
    quantization = config.get("quantization_config")
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def check_names(codecs: ModuleCodecs, checkpoint: str) -> None:
    """Raise CheckpointError if vLLM would not find the encoding of one of the modules under its name.

    In BERT and its relatives, the layer that fuses ``attention.self.query``, ``key`` and ``value`` goes by the name
    ``attention.output.qkv_proj`` (vllm 0.32.0, ``models/bert.py``).
    """
    if hidden := next((name for name in codecs.modules if ".attention.self." in name), None):
        raise CheckpointError(
            f"{checkpoint} has {hidden} encoded, which vLLM does not support",
            expected="plain weights in the attention of BERT and its relatives",
            fix="""encode it again with --plugins '{"fp8": {"exclude": ["**.attention.self.*"]}}'""",
        )


def made_for(model: Path) -> int | None:
    """Return the number of tensor parallel processes for which a checkpoint has separate files.

    Returns None for other checkpoints. Read in vllm 0.32.0 (``sharded_state_loader.py``).
    """
    names = (re.match(r"model-rank-(\d+)-part-", path.name) for path in model.glob("model-rank-*.safetensors"))
    ranks = {int(name[1]) for name in names if name}
    if ranks and ranks != set(range(len(ranks))):
        raise CheckpointError(
            f"{model} has files of the processes {sorted(ranks)[:3]}...",
            expected="consecutive numbers from 0",
            fix="copy it again, or create it again",
        )
    return len(ranks) or None


def _service(name: str) -> Callable[..., Any]:
    """Return :func:`arctic_plugins.host.service`; if it does not exist, raise an error that names its distribution."""
    try:
        return service(name)
    except PluginNotFoundError as error:
        raise ConfigError(
            f"plugins that change a model need arctic-plugins-huggingface ({error})",
            fix="pip install arctic-plugins-huggingface",
        ) from error
