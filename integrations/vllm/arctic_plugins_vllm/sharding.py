"""Files for each tensor parallel process, for vLLM's ``load_format="sharded_state"``, written by a single process.

Read in vllm 0.32.0. What a process holds depends on how vLLM builds each architecture: which modules it fuses, pads,
splits or copies. vLLM therefore builds the model here as well, for one rank after another, in a group in which only
this process exists. It loads the checkpoint as that rank would. The model is saved before vLLM rearranges weights for
its kernels, because rearranged weights cannot be loaded again (``model_loader/sharded_state_loader.py`` loads before
that step).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arctic_plugins.errors import ArcticError, ConfigError
from arctic_plugins.files import copy_files, read_json
from arctic_plugins.patches import replaced
from arctic_plugins.provenance import FILE_NAME, write_provenance
from arctic_plugins.recorded import recorded_stack
from arctic_plugins_vllm.compat import (
    DefaultModelLoader,
    EngineArgs,
    ShardedStateLoader,
    cleanup_dist_env_and_memory,
    get_tp_group,
    init_distributed_environment,
    initialize_model,
    initialize_model_parallel,
    set_current_vllm_config,
)
from arctic_plugins_vllm.experts import EncodedExpertsMethod
from arctic_plugins_vllm.linear import EncodedLinearMethod

__all__ = ["built_as_rank", "check_shares", "shard_checkpoint"]

FILE_SIZE = 5 * 10**9
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


def check_shares(
    checkpoint: str | Path, size: int, hf_overrides: dict[str, Any] | None = None, *, trust_remote_code: bool = False
) -> None:
    """Raise ConfigError if the model, encoded as ``hf_overrides`` specify, cannot be split over ``size`` processes.

    Reads no weights.
    """
    with built_as_rank(checkpoint, 0, size, hf_overrides, trust_remote_code):
        pass


def shard_checkpoint(
    checkpoint: str | Path, directory: str | Path, size: int, *, trust_remote_code: bool = False
) -> Path:
    """Write the whole, encoded ``checkpoint`` to the existing ``directory``, split for ``size`` processes.

    ``arctic_plugins.json`` is written last.

    Raises:
        ConfigError: the model cannot be split.
        CheckpointError: weights are missing.
    """
    source, target = Path(checkpoint), Path(directory)
    for rank in range(size):
        with built_as_rank(source, rank, size, trust_remote_code=trust_remote_code) as (model, config):
            DefaultModelLoader(config.load_config).load_weights(model, config.model_config)
            for module in model.modules():
                method = getattr(module, "quant_method", None)
                if isinstance(method, EncodedLinearMethod | EncodedExpertsMethod):
                    method.check_complete(module)
            ShardedStateLoader.save_model(model, str(target), max_size=FILE_SIZE)
    copy_files(source, target, lambda name: name != FILE_NAME and not name.endswith(_WEIGHTS))
    write_provenance(target, recorded_stack(source).to_dict())
    return target


@contextmanager
def built_as_rank(
    checkpoint: str | Path,
    rank: int,
    size: int,
    hf_overrides: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Iterator[tuple[nn.Module, Any]]:
    """Yield vLLM's model with empty weights on the CPU, as rank ``rank`` of ``size`` builds it, and vLLM's config."""
    described = read_json(Path(checkpoint) / "config.json") if Path(checkpoint).is_dir() else {}
    with tempfile.TemporaryDirectory() as meeting, torch.device("cpu"):
        before = torch.get_default_dtype()
        try:
            config = EngineArgs(
                model=str(checkpoint),
                dtype=described.get("dtype") or described.get("torch_dtype") or "auto",  # "auto" would round float32
                tensor_parallel_size=size,
                distributed_executor_backend="mp",  # otherwise vLLM looks for as many GPUs
                enforce_eager=True,
                use_tqdm_on_load=False,
                hf_overrides=hf_overrides or {},
                trust_remote_code=trust_remote_code,
            ).create_engine_config()
            with set_current_vllm_config(config):
                init_distributed_environment(1, 0, f"file://{meeting}/store", 0, "gloo")
                initialize_model_parallel(1, 1)
                torch.set_default_dtype(config.model_config.dtype)
                with _as_rank(rank, size):
                    yield initialize_model(config), config
        except (
            AssertionError,
            ValueError,
        ) as error:  # raised by the size checks of vLLM's layers, or by pydantic (ValueError)
            if isinstance(error, ArcticError):
                raise
            raise ConfigError(
                f"vLLM cannot split {checkpoint} over {size} processes ({_first_line(error)})",
                fix="set another --tensor-parallel",
            ) from error
        finally:
            torch.set_default_dtype(before)
            cleanup_dist_env_and_memory()


@contextmanager
def _as_rank(rank: int, size: int) -> Iterator[None]:
    """Make vLLM build and load layers as rank ``rank`` of ``size``.

    Whatever builds or loads a part of a layer asks the tensor parallel group which part it is; there is no other way to
    set it.
    """
    group, why = get_tp_group(), "one process builds the model of each rank in turn"
    with (
        replaced(group, "world_size", size, why=why, read_in="vllm 0.32.0"),
        replaced(group, "rank_in_group", rank, why=why, read_in="vllm 0.32.0"),
    ):
        yield


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:  # pydantic: the first line only counts the errors
        lines = lines[1:]
    return lines[0].removeprefix("Value error, ").split(" [type=")[0] if lines else type(error).__name__
