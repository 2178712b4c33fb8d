"""Merging a LoRA adapter into its base model, one safetensors file at a time. Read in peft 0.21.2."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from arctic_plugins.adapter import WEIGHTS, AdapterConfig, adapted_modules, read_any_adapter
from arctic_plugins.errors import CheckpointError, CodecError
from arctic_plugins.files import read_json
from arctic_plugins.frozen import Codec
from arctic_plugins.frozen.codec import check_buffers
from arctic_plugins.provenance import write_provenance
from arctic_plugins.recorded import stack_from_checkpoint
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.adapters.lora import ExpertPairs, load_adapter, resize_embedding
from arctic_plugins_huggingface.checkpoints.load import adapted_task, adapter_base, ends_of, own_tokenizer, stop_at_end
from arctic_plugins_huggingface.checkpoints.save import save_checkpoint
from arctic_plugins_huggingface.files.check import adapter_directory, check_checkpoint
from arctic_plugins_huggingface.files.rewrite import Read, open_files, rewrite
from arctic_plugins_huggingface.files.staging import check_new, staged
from arctic_plugins_huggingface.loading.config import STORED, is_encoded, is_quantized_otherwise, load_config
from arctic_plugins_huggingface.loading.conversions import EXPERT
from arctic_plugins_huggingface.loading.load import freeze, load_model
from arctic_plugins_huggingface.loading.plan import WeightPlan, plan_model

__all__ = ["Update", "merge_adapter"]

_PREFIX = "base_model.model."
_OTHER_KINDS = (
    *(field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant")),
    *("lora_bias", "fan_in_fan_out", "layer_replication"),
    *("modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern"),
)
"""Fields of a ``LoraConfig`` that make it more than one product per linear module, or that are left to PEFT."""


@dataclass(frozen=True)
class Update:
    """The update of one weight: ``scaling * up [N, r] @ down [r, K]``."""

    down: Tensor
    """``[r, K]``."""
    up: Tensor
    """``[N, r]``."""
    scaling: float
    """LoRA's ``alpha / r``, or another factor."""

    def add_to(self, weight_NK: Tensor) -> Tensor:
        """Return the sum of the weight and the update, in float32.

        Raises:
            CodecError: the shapes do not match, or the sum is not finite.
        """
        shape = self.up.shape[0], self.down.shape[1]
        if tuple(weight_NK.shape) != shape:
            raise CodecError(
                f"the weight has shape {tuple(weight_NK.shape)}, but the update has {shape}",
                fix="use the model that the adapter was trained on",
            )
        merged = weight_NK.float().addmm(self.up.float(), self.down.float(), alpha=self.scaling)
        if not bool(merged.isfinite().all()):
            raise CodecError(
                "the merged weight contains NaN or Inf", fix="the adapter is damaged, or its training diverged"
            )
        return merged


def merge_adapter(
    adapter: str | Path, directory: str | Path, *, base: str | Path | None = None, trust_remote_code: bool = False
) -> Path:
    """Merge a PEFT adapter into its base model and write a checkpoint, encoded as the adapter's stack specifies.

    If the adapter changes the head or the embedding and the two share a weight, the head gets a weight of its own.

    If the base is plain, the update is added to the original weights and the sum is encoded. Encoding first would round
    small updates away, because encoded weights lie on the grid to which the sum is rounded. If the base is encoded, the
    original weights are not available, and the update is added to the decoded ones. Sums are computed in float32.

    If the base is a directory and the adapter is LoRA or rsLoRA on linear modules and experts, memory is bounded by the
    largest safetensors file of the base. For a base from the Hub, other PEFT adapters, and stacks whose plugins change
    the model, the whole model is loaded. Adapters other than LoRA may depend on the weights that they were trained
    over, and are merged into these: encoded weights are decoded, changed and encoded again, module by module.

    Args:
        adapter: directory or Hub id.
        directory: new directory for the result.
        base: directory or Hub id of the base model; by default, the one that the adapter's config names.
        trust_remote_code: whether the base model's own code may be executed, if it needs it.

    Raises:
        CheckpointError: ``adapter`` is not an adapter that arctic-plugins finished writing, or does not match its base.
        CodecError: a merged weight contains NaN or Inf; names the module.
        ConfigError: ``directory`` exists and is not empty.
    """
    check_new(directory)
    found = adapter_directory(adapter)
    if found is None:
        raise CheckpointError(
            f"{adapter} has no adapter_config.json",
            expected="an adapter written by 'arctic train' or by PEFT",
            fix="pass its directory",
        )
    stack, base = stack_from_checkpoint(found), adapter_base(found, base)
    codecs = stack.only("weight_codec")
    others = stack.to_use().without("weight_codec", "adapter", "placement")
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    is_lora, task = isinstance(read_any_adapter(found), AdapterConfig), adapted_task(found)
    alone = is_lora and not task and not len(others)
    if alone and Path(base).is_dir() and (halves := _halves(found)) is not None:
        check_checkpoint(base)
        config = load_config(base, **trust)
        if not is_quantized_otherwise(config):
            # check_checkpoint has just compared the files.
            plan = plan_model(base, Stack() if is_encoded(config) else codecs, checked=True, config=config, **trust)
            claimed = plan.weights
            updates = _updates(found, halves, claimed)
            tied = {name for name, spec in claimed.specs.items() if spec.tied}
            if updates.keys() <= _modules(Path(base)) - tied:
                with staged(directory) as draft:
                    _merge_files(Path(base), draft, claimed, updates, encoded=is_encoded(config))
                    if (tokenizer := own_tokenizer(found)) is not None:
                        tokenizer.save_pretrained(draft)
                        _stop_at_end(draft, config, tokenizer)
                    write_provenance(draft, codecs.to_dict())
                return Path(directory)
    plugins = others if is_lora else others.plus(codecs)
    model, base_tokenizer = load_model(base, plugins, dtype=STORED, **trust, **task)
    resize_embedding(model, found)
    _untie(model, found)
    adapted = load_adapter(model, found)
    try:
        merged = adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"PEFT cannot merge {found}: {' '.join(str(error).split())}", fix="use the adapter without merging it"
        ) from error
    if not is_encoded(merged.config):
        freeze(merged, codecs)
    tokenizer = own_tokenizer(found) or base_tokenizer
    stop_at_end(merged, tokenizer)
    return save_checkpoint(merged, tokenizer, directory, codecs)


def _stop_at_end(directory: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generation stop at the tokenizer's end-of-text token, with the model in ``directory``."""
    path = directory / "generation_config.json"
    content = read_json(path) if path.is_file() else GenerationConfig.from_model_config(config).to_diff_dict()
    known = content.get("eos_token_id")
    if (ends := ends_of(known, tokenizer)) not in (known, [known]):
        path.write_text(json.dumps({**content, "eos_token_id": ends}, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _untie(model: PreTrainedModel, adapter: Path) -> None:
    """Give the head its own weight, also in the config, if the adapter changes it or the embedding it is tied to.

    In training, the adapter changed only one of the two. Merged into the shared weight, it would change both.
    """
    config = read_any_adapter(adapter)
    targets = adapted_modules(adapter) if isinstance(config, AdapterConfig) else config.target_modules or ()
    changed = {*targets, *(config.modules_to_save or ())}
    for head, embedding in dict(model.all_tied_weights_keys).items():
        if any(
            f".{name.removesuffix('.weight')}".endswith(f".{module}")
            for name in (head, embedding)
            for module in changed
        ):
            module, _, leaf = head.rpartition(".")
            setattr(
                model.get_submodule(module),
                leaf,
                nn.Parameter(model.get_parameter(embedding).clone(), requires_grad=False),
            )
            del model.all_tied_weights_keys[head]
            model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _halves(adapter: Path) -> dict[str, dict[str, Tensor]] | None:
    """Return module -> "A" and "B" of an adapter; None if only PEFT can merge an adapter of this kind."""
    config = LoraConfig.from_pretrained(str(adapter))
    if any(getattr(config, name, None) for name in _OTHER_KINDS) or config.bias != "none":
        return None
    tensors = load_file(adapter / WEIGHTS)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, half = key.removeprefix(_PREFIX).rpartition(".lora_")
        if not key.startswith(_PREFIX) or half not in ("A.weight", "B.weight") or tensor.dim() != 2:
            return None
        halves.setdefault(module, {})[half[0]] = tensor
    if lacking := [module for module, pair in halves.items() if len(pair) < 2]:
        raise CheckpointError(
            f"{adapter} holds only half of the update of {lacking[0]}", fix="the adapter is incomplete: save it again"
        )
    return halves


def _updates(adapter: Path, halves: Mapping[str, Mapping[str, Tensor]], claimed: WeightPlan) -> dict[str, Update]:
    """Return the update of each module in the base's files."""
    config = LoraConfig.from_pretrained(str(adapter))
    scaling = config.lora_alpha / (math.sqrt if config.use_rslora else float)(
        config.r
    )  # Kalajdzievski, "rsLoRA", 2023; Hu et al., "LoRA", 2021
    updates: dict[str, Update] = {}
    for module, pair in halves.items():
        name = _expert_weight(module, claimed, config.target_parameters or ())
        if name is None:
            updates[module] = Update(pair["A"], pair["B"], scaling)
            continue
        spec, parts = claimed.specs[name], claimed.stored[name]
        shapes = (config.r * spec.shape[0], spec.in_features), (spec.out_features, config.r * spec.shape[0])
        if (tuple(pair["A"].shape), tuple(pair["B"].shape)) != shapes:
            raise CheckpointError(
                f"{adapter} has shapes {tuple(pair['A'].shape)} and {tuple(pair['B'].shape)} for {name}",
                expected=f"{shapes[0]} and {shapes[1]}",
                fix="use the model that the adapter was trained on",
            )
        downs, ups = (
            ExpertPairs(config.r, last=False).split(pair["A"]),
            ExpertPairs(config.r, last=True).split(pair["B"]),
        )
        for expert, (down, up) in enumerate(zip(downs, ups, strict=True)):
            for part, rows in zip(parts, up.chunk(len(parts)), strict=True):
                updates[part.replace(f".{EXPERT}.", f".{expert}.")] = Update(down, rows, scaling)
    return updates


def _expert_weight(module: str, claimed: WeightPlan, targets: Collection[str]) -> str | None:
    """Return the experts' weight that PEFT's wrapper ``module`` adapts.

    If several weights of the same experts are adapted, their wrappers are nested: the first is innermost, the
    ``base_layer`` of the next.
    """
    path = module
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    wrapped = [
        name
        for name, spec in claimed.specs.items()
        if spec.experts is not None
        and name.rpartition(".")[0] == path
        and any(f".{name}".endswith(f".{target}") for target in targets)
    ]
    depth = module.count(".base_layer") - path.count(".base_layer")
    return wrapped[-1 - depth] if depth < len(wrapped) else None


def _modules(base: Path) -> set[str]:
    with ExitStack() as stack:
        return {key.removesuffix(".weight") for file in open_files(base, stack).values() for key in file.keys()}  # noqa: SIM118


def _merge_files(base: Path, draft: Path, claimed: WeightPlan, updates: Mapping[str, Update], *, encoded: bool) -> None:
    codecs: dict[str, tuple[Codec, tuple[int, int]]] = claimed.on_disk()
    config: dict[str, Any] = read_json(base / "config.json")
    if (quantization := claimed.quantization()) is not None:
        config["quantization_config"] = quantization.to_dict()

    def tensors(name: str, read: Read) -> dict[str, Tensor]:
        update = updates.get(name)
        if name not in codecs:
            weight = read("weight")
            return {"weight": weight if update is None else update.add_to(weight).to(weight.dtype)}
        codec, shape = codecs[name]
        if encoded:
            buffers = {suffix: read(f"weight{suffix}") for suffix in codec.layout(shape)}
            check_buffers(codec, buffers, shape, f"{name}.weight")
            if update is not None:
                buffers = codec.encode(update.add_to(codec.decode(buffers, shape, torch.float32)))
        else:
            weight = read("weight")
            buffers = codec.encode(weight if update is None else update.add_to(weight))
        return {f"weight{suffix}": buffer for suffix, buffer in buffers.items()}

    rewrite(base, draft, config, {*codecs, *updates}, tensors)
