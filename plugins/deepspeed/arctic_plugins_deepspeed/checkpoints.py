"""Conversion of DeepSpeed checkpoints that were trained with the original stack.

The LoRA of DeepSpeed's ``OptimizedLinear`` becomes a PEFT adapter or is merged, and the names and files of
DeepSpeed-MoE become those of Hugging Face.

The layout is the one that the original stack's own converter reads. ``<step>/mp_rank_00_model_states.pt`` holds, under
``module``, every tensor except the frozen weights, including ``X.lora_weight_1.weight [r, K]`` and
``X.lora_weight_2.weight [N, r]``. ``<step>/lora_optimized_linear_sharding_rank_R.pt`` holds process R's part of every
frozen weight, ``X.weight [N, K / processes]``; the parts are concatenated along K. DeepSpeed's own class
(``deepspeed/linear/optimized_linear.py``, 0.19.8) splits the flattened weight instead, so one-dimensional parts are
concatenated and reshaped. A mixture has one ``layer_L_expert_E_mp_rank_00_model_states.pt`` per expert, where L counts
the mixtures (``DeepSpeedEngine._save_moe_checkpoint``, 0.19.8).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from arctic_plugins_huggingface.checkpoints import SHARD_SIZE, Update
from arctic_plugins_huggingface.files import INDEX, staged
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from arctic_plugins import write_provenance
from arctic_plugins.adapter import WEIGHTS
from arctic_plugins.errors import CheckpointError, CodecError, named
from arctic_plugins.files import copy_files, read_json
from arctic_plugins_deepspeed.config import DeepSpeedImport

__all__ = ["convert_deepspeed"]

_STATES = "mp_rank_00_model_states.pt"
_SHARD = re.compile(r"lora_optimized_linear_sharding_rank_(\d+)\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
_RENAMED = (
    ("block_sparse_moe.mlp.deepspeed_moe.gate.wg.", "block_sparse_moe.gate."),
    ("block_sparse_moe.mlp.deepspeed_moe.experts.deepspeed_experts.", "block_sparse_moe.experts."),
)
_OURS = ("ds_lora", "ds_quantization", "use_deepspeed_moe_implementation", "moe_expert_parallel_size")
"""Keys of ``config.json`` that only the original stack reads."""


def convert_deepspeed(
    checkpoint: str | Path, directory: str | Path, options: DeepSpeedImport | None = None
) -> list[str]:
    """Convert a DeepSpeed checkpoint to Hugging Face's names, with LoRA merged.

    With ``options.base``, write only its LoRA, as a PEFT adapter on that model.

    Args:
        checkpoint: the directory of a step, or its parent (whose ``latest`` names a step).
        directory: a new directory.
        options: by default those of :class:`DeepSpeedImport`.

    Returns:
        Lines that describe what was found.

    Raises:
        CheckpointError: a file is missing (for example an expert's) or is not a pickle of tensors only; tensors do not
            fit together; an adapter is requested but there is no LoRA; or alpha is unknown.
        CodecError: a merged weight contains NaN or Inf; the error names the module.
        ConfigError: ``directory`` exists and is not empty.
    """
    options = options or DeepSpeedImport()
    base = options.base
    source = _Source.find(Path(checkpoint), options)
    source.check_experts()
    updates = source.updates()
    if not updates and base is not None:
        raise CheckpointError(
            f"{source.step} has no lora_weight_1", expected="a checkpoint of DeepSpeed's OptimizedLinear with LoRA"
        )
    found = [f"{source.step}: no LoRA, weights are copied unchanged"]
    if updates:
        found = [
            (
                f"{source.step}: {len(updates)} updates of rank {source.rank}, scaled by "
                f"{source.factor:g} ({options.scaling})"
            )
        ]
    if source.experts:
        found.append(f"{len(source.experts)} expert files")
    with staged(directory) as draft:
        if base is None:
            source.write_merged(draft, updates)
            if source.shards:
                found.append(f"{len(source.shards)} parts of the frozen weights were joined")
        else:
            source.write_adapter(draft, updates, base)
        copy_files(
            source.top,
            draft,
            lambda name: name.startswith("tokenizer") or name == "special_tokens_map.json" or name.endswith(".jinja"),
        )
        write_provenance(draft, {})
    return found


@dataclass(frozen=True)
class _Source:
    top: Path
    """The directory that contains ``config.json``."""
    step: Path
    options: DeepSpeedImport

    @classmethod
    def find(cls, path: Path, options: DeepSpeedImport) -> _Source:
        """Return the step in ``path``, or ``path`` itself if it is one."""
        step = path
        if not (path / _STATES).is_file():
            latest = (path / "latest").read_text(errors="replace").strip() if (path / "latest").is_file() else None
            steps = sorted(
                (found.parent for found in path.glob(f"*/{_STATES}")), key=lambda found: (len(found.name), found.name)
            )
            if not steps:
                raise CheckpointError(
                    f"{path} has no {_STATES}",
                    expected="a DeepSpeed checkpoint, or one of its steps",
                    fix="correct the path",
                )
            step = next((found for found in steps if found.name == latest), steps[-1])
        top = next((folder for folder in (step, step.parent) if (folder / "config.json").is_file()), None)
        if top is None:
            raise CheckpointError(
                f"neither {step} nor its parent has a config.json", fix="copy the model's next to the steps"
            )
        return cls(top, step, options)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.top / "config.json")

    @cached_property
    def module(self) -> dict[str, Tensor]:
        return _tensors(self.step / _STATES, key="module")

    @cached_property
    def shards(self) -> list[dict[str, Tensor]]:
        numbered = {int(match[1]): path for path in self.step.iterdir() if (match := _SHARD.fullmatch(path.name))}
        if not numbered:
            return []
        if sorted(numbered) != list(range(len(numbered))):
            raise CheckpointError(
                f"{self.step} has the parts {sorted(numbered)}",
                expected="consecutive numbers from 0",
                fix="copy the missing files",
            )
        parts = [_tensors(numbered[rank]) for rank in range(len(numbered))]
        if any(part.keys() != parts[0].keys() for part in parts):
            raise CheckpointError(
                f"the files lora_optimized_linear_sharding_rank_*.pt in {self.step} contain different weights",
                fix="copy them again",
            )
        return parts

    @cached_property
    def everything(self) -> dict[str, Tensor]:
        """Every tensor except the frozen weights that are split over processes."""
        found = dict(self.module)
        for path in self.experts.values():
            found |= _tensors(path)
        return found

    @cached_property
    def experts(self) -> dict[tuple[int, int], Path]:
        """(mixture, expert), both counted from 0 -> its file."""
        matches = ((path, _EXPERT.fullmatch(path.name)) for path in self.step.iterdir())
        return {(int(match[1]), int(match[2])): path for path, match in matches if match}

    def check_experts(self) -> None:
        """Raise CheckpointError unless every mixture has a file for each expert of ``config.json``."""
        if not self.experts:
            return
        count = self.config.get("num_local_experts") or self.config.get("num_experts")
        if not isinstance(count, int):
            raise CheckpointError(
                f"{self.top}/config.json does not specify the number of experts",
                expected="num_local_experts",
                fix="copy the model's config.json",
            )
        mixtures = range(max(mixture for mixture, _ in self.experts) + 1)
        wanted = {(mixture, expert) for mixture in mixtures for expert in range(count)}
        if missing := sorted(wanted - self.experts.keys()):
            mixture, expert = missing[0]
            raise CheckpointError(
                f"{self.step} lacks expert files ({len(missing)}), for example "
                f"layer_{mixture}_expert_{expert}_{_STATES}",
                expected=f"{count} for each mixture (config.json)",
                fix="copy the missing files",
            )
        if other := sorted(self.experts.keys() - wanted):
            raise CheckpointError(
                f"{self.step} has {self.experts[other[0]].name}",
                expected=f"{count} experts (config.json)",
                fix="copy the model's config.json",
            )

    @property
    def rank(self) -> int:
        return min(
            tensor.shape[0] for name, tensor in self.everything.items() if name.endswith(".lora_weight_1.weight")
        )

    @property
    def alpha(self) -> float:
        given = self.options.alpha
        known = given if given is not None else (self.config.get("ds_lora") or {}).get("lora_alpha")
        if not isinstance(known, (int, float)):
            raise CheckpointError(
                f"{self.top}/config.json has no ds_lora.lora_alpha",
                expected="the alpha that was used in training",
                fix="pass it with --alpha",
            )
        return float(known)

    @property
    def factor(self) -> float:
        return self.alpha / (self.rank if self.options.scaling == "alpha/r" else math.sqrt(self.rank))

    def updates(self) -> dict[str, Update]:
        """Return a mapping of modules, by their names in the original stack, to the updates of their weights."""
        pairs = {
            name.removesuffix(".lora_weight_1.weight"): (
                down,
                self.everything.get(name.replace(".lora_weight_1.", ".lora_weight_2.")),
            )
            for name, down in self.everything.items()
            if name.endswith(".lora_weight_1.weight")
        }
        found = {}
        for module, (down, up) in pairs.items():
            if (
                up is None
                or down.dim() != 2
                or up.dim() != 2
                or down.shape[0] != up.shape[1]
                or down.shape[0] != self.rank
            ):
                second = None if up is None else tuple(up.shape)
                raise CheckpointError(
                    f"{module} has lora_weight_1 {tuple(down.shape)} and lora_weight_2 {second}",
                    expected=f"[{self.rank}, K] and [N, {self.rank}]",
                )
            found[module] = Update(down, up, self.factor)
        return found

    def weight(self, name: str, update: Update) -> Tensor:
        """Return the frozen weight ``name``, ``[N, K]``, joined from its parts."""
        parts = [shard[name] for shard in self.shards if name in shard]
        shape = update.up.shape[0], update.down.shape[1]
        if not parts and name in self.everything:
            parts = [self.everything[name]]
        if not parts:
            raise CheckpointError(
                f"no file in {self.step} contains {name}", fix="copy the files lora_optimized_linear_sharding_rank_*.pt"
            )
        whole = torch.cat(parts, dim=1) if parts[0].dim() == 2 else torch.cat(parts).view(-1)
        if whole.numel() != math.prod(shape) or (whole.dim() == 2 and tuple(whole.shape) != shape):
            raise CheckpointError(
                f"the parts of {name} add up to the shape {tuple(whole.shape)}",
                expected=str(shape),
                fix="copy the missing files",
            )
        return whole.view(shape)

    def write_merged(self, draft: Path, updates: Mapping[str, Update]) -> None:
        """Write the weights to safetensors files; peak memory is that of one file."""
        changed = {f"{module}.weight": update for module, update in updates.items()}
        dtype = next((update.up.dtype for update in updates.values()), None)
        whole = {
            _renamed(name): name
            for name in [*(name for name in self.everything if ".lora_weight_" not in name), *changed]
        }
        sizes = {
            new: torch.empty((changed[name].up.shape[0], changed[name].down.shape[1]), dtype=dtype, device="meta")
            if name in changed
            else torch.empty_like(self.everything[name], device="meta")
            for new, name in whole.items()
        }
        split = split_torch_state_dict_into_shards(
            sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
        )
        for file_name, names in split.filename_to_tensors.items():
            save_file(
                {new: self._merged(whole[new], changed) for new in names}, draft / file_name, metadata={"format": "pt"}
            )
        if split.is_sharded:
            (draft / INDEX).write_text(
                json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, indent=2)
            )
        config = {key: value for key, value in self.config.items() if key not in _OURS}
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_files(self.top, draft, lambda name: name == "generation_config.json")

    def _merged(self, name: str, changed: Mapping[str, Update]) -> Tensor:
        if name not in changed:
            return self.everything[name].clone()  # a view of a file may share memory, which safetensors refuses
        with named(name.removesuffix(".weight"), CodecError):
            weight = self.weight(name, changed[name])
            if not weight.is_floating_point():
                raise CodecError(
                    f"the frozen weight is quantized ({weight.dtype})", fix="convert to an adapter, with --base"
                )
            return changed[name].add_to(weight).to(weight.dtype)

    def write_adapter(self, draft: Path, updates: Mapping[str, Update], base: str) -> None:
        """Write the updates in the format of a PEFT LoRA adapter."""
        tensors = dict(_halves(updates))
        targets = sorted({_renamed(f"{module}.").rstrip(".").rpartition(".")[2] for module in updates})
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT only divides it by r; it need not be an integer
            target_modules=targets,
            use_rslora=self.options.scaling == "alpha/sqrt(r)",
            base_model_name_or_path=base,
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(draft))


def _halves(updates: Mapping[str, Update]) -> Iterator[tuple[str, Tensor]]:
    for module, update in updates.items():
        name = _renamed(f"{module}.").rstrip(".")
        yield f"base_model.model.{name}.lora_A.weight", update.down.clone()
        yield f"base_model.model.{name}.lora_B.weight", update.up.clone()


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def _tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors in a pickle, mapped from the file; no code in it is executed.

    Raises:
        CheckpointError: the file is damaged, or contains more than tensors, numbers, strings and containers.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        line = next(
            (line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line),
            str(error).splitlines()[0],
        )
        raise CheckpointError(
            f"{path} is a pickle that would run code: {line[:200]}",
            expected="only tensors, numbers, strings and containers",
            fix="if you trust it, save only its 'module', with the torch that wrote it",
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}", fix="copy it again") from error
    if key is not None and isinstance(content, Mapping):
        content = content.get(key)
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        where = f"'{key}' of {path}" if key else str(path)
        raise CheckpointError(
            f"{where} is not a mapping of names to tensors", expected="a DeepSpeed checkpoint", fix="correct the path"
        )
    return dict(content)
