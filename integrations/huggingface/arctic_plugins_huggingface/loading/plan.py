"""The plan of a model: what a stack will do to it, settled before any weights are read.

:func:`plan_model` is the only place where a config is read and changed, plugins validate it, and claims are settled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from arctic_plugins.claims import LinearSpec, SettledClaims
from arctic_plugins.compute import dtype_name
from arctic_plugins.errors import CheckpointError, ClaimError, ConfigError, one_line
from arctic_plugins.files import check_elements
from arctic_plugins.frozen import Codec, ExpertsDispatch, ModuleCodecs, Placement, PlainCodec, chain
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.adapters.embeddings import embedding_rows
from arctic_plugins_huggingface.files.check import check_checkpoint, check_encoded
from arctic_plugins_huggingface.loading.config import (
    auto_class_of,
    device_of,
    is_encoded,
    is_quantized_otherwise,
    load_config,
    load_tokenizer,
    only_hub,
    resolve_dtype,
    skeleton,
    stored_dtype,
    text_tokenizer,
)
from arctic_plugins_huggingface.loading.names import Renamed, in_checkpoint, stored_codecs, stored_names, stored_shapes
from arctic_plugins_huggingface.loading.quantizer import ArcticQuantizationConfig, register
from arctic_plugins_huggingface.loading.tasks import LABELS, architectures_of, task_name
from arctic_plugins_huggingface.loading.weights import weight_specs

__all__ = ["ModelPlan", "WeightPlan", "configured", "plan_model", "plan_weights", "planned_config"]

MOST_LABELS = 100_000


@dataclass(frozen=True)
class WeightPlan:
    """The plan for a model's weights.

    Names are those of :func:`~arctic_plugins_huggingface.loading.weights.weight_specs`.
    """

    specs: dict[str, LinearSpec]
    """Every weight that can be claimed."""
    claims: SettledClaims
    """The plugins' claims on these weights, by slot."""
    codecs: dict[str, Codec]
    """The codec of each encoded weight, either claimed or recorded in an encoded checkpoint.

    If nothing is encoded: the plain codec, for every weight that a placement claims.
    """
    stored: dict[str, tuple[str, ...]]
    """Name -> the checkpoint modules that hold the weight, as this model is saved."""
    placements: dict[str, Placement]
    """Placements of the encoded weights that are not resident."""
    dispatches: dict[str, ExpertsDispatch]
    """Dispatches of the experts that are spread over processes, or whose tokens may be dropped."""
    resident: dict[str, int]
    """Bytes that each encoded weight takes on the compute device, in this process."""
    elements: int
    """Number of elements of all tensors of the model, decoded."""
    renamed: Renamed = str
    """Name in :attr:`stored` -> name in the encoded checkpoint; they differ if one of the two has no head."""

    def quantization(self) -> ArcticQuantizationConfig | None:
        """Return the ``quantization_config`` for loading a plain checkpoint; None if its weights stay as they are."""
        if not self.codecs and not self.dispatches:
            return None
        return ArcticQuantizationConfig.from_owners(*self._owners(), self.placements, self.dispatches)

    def stored_quantization(self) -> dict[str, Any]:
        """Return the ``quantization_config`` for loading an encoded checkpoint."""
        stored = ModuleCodecs.from_owners(*self._owners()).to_config()
        return {**stored, "placements": self.placements, "dispatches": self.dispatches}

    def on_disk(self) -> dict[str, tuple[Codec, tuple[int, int]]]:
        """Map every encoded module of a checkpoint to its codec and the weight's (N, K)."""
        shapes = {name: stored_shapes({name: self.specs[name]}, self.stored) for name in self.codecs}
        return {
            self.renamed(part): (self.codecs[name], shape)
            for name, parts in shapes.items()
            for part, shape in parts.items()
        }

    def _owners(self) -> tuple[dict[str, Codec], list[str]]:
        """Return a map from a checkpoint's module names to codecs, and the names of all modules that hold weights."""
        owners = {part: codec for name, codec in self.codecs.items() for part in self.stored[name]}
        return owners, [part for parts in self.stored.values() for part in parts]


@dataclass(frozen=True)
class ModelPlan:
    """The plan of what a stack will do to the model of a checkpoint.

    It is created by :func:`plan_model`. Load it once, with :func:`~arctic_plugins_huggingface.load_model`.
    """

    checkpoint: str
    """Directory or Hub id."""
    auto_class: Any
    """The class of transformers that loads the model."""
    stack: Stack
    """The plugins, checked for this model."""
    config: PreTrainedConfig
    """The checkpoint's config, as changed by the stack."""
    changes: dict[str, Any]
    """The stack's changes to the config: key of ``config.json`` -> value."""
    weights: WeightPlan
    """What becomes of each weight."""
    skeleton: PreTrainedModel = field(repr=False)
    """The plain model on the meta device: shapes without data."""
    stored_dtype: torch.dtype
    """The dtype of the checkpoint."""
    asked_dtype: torch.dtype | str
    """The ``dtype`` that was asked for; ``auto`` by default."""
    dtype: torch.dtype
    """The dtype of matrix products, and of weights that are not encoded."""
    dtype_reason: str
    """Why ``dtype`` differs from the checkpoint's, or why it is slow on this device; empty otherwise."""
    warnings: tuple[str, ...]
    """The plugins' warnings, each prefixed with the name of its plugin."""
    load: dict[str, Any] = field(repr=False)
    """Further arguments of ``from_pretrained``."""
    contents_checked: bool
    """Whether the digests of the checkpoint's files were compared, if it is a directory."""
    new_tokens: tuple[str, ...] = ()
    """Tokens whose embeddings are to be trained; those that the checkpoint's tokenizer lacks are added to it."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer with the new tokens, read on first access.

        Of a model that also reads images, its processor.

        Raises:
            CheckpointError: the tokenizer is missing or damaged.
        """
        processor = self.task == "image-text-to-text"
        tokenizer = load_tokenizer(self.checkpoint, processor=processor, config=self.config, **only_hub(self.load))
        if self.new_tokens:
            text_tokenizer(tokenizer).add_tokens(list(self.new_tokens))
        return tokenizer

    @property
    def new_token_ids(self) -> tuple[int, ...]:
        """The ids of the new tokens, and of all other tokens that the checkpoint has no embedding for.

        Empty if there are no new tokens.
        """
        if not self.new_tokens:
            return ()
        tokenizer, rows = text_tokenizer(self.tokenizer), embedding_rows(self.skeleton)
        beyond = range(rows, len(tokenizer)) if rows is not None else ()
        return tuple(sorted({*map(tokenizer.convert_tokens_to_ids, self.new_tokens), *beyond}))

    @property
    def embeddings(self) -> int | None:
        """The number of embeddings of the model once it is loaded; None if it has no table of them."""
        rows = embedding_rows(self.skeleton)
        return rows if rows is None else max(rows, *(token + 1 for token in self.new_token_ids), 0)

    @property
    def task(self) -> str:
        """The task that the model is loaded for, for example ``text-generation``."""
        return task_name(self.auto_class)

    @property
    def new_head(self) -> bool:
        """Whether the checkpoint is not of the model's class, so that the model has a head which it need not have."""
        return type(self.skeleton).__name__ not in architectures_of(self.config)

    @property
    def encoded(self) -> bool:
        """Whether the checkpoint already holds encoded weights."""
        return is_encoded(self.config)


def plan_model(
    checkpoint: str | Path,
    stack: Stack | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    auto_class: Any = None,
    checked: bool = False,
    new_tokens: Sequence[str] = (),
    **kwargs: Any,
) -> ModelPlan:
    """Plan what ``stack`` will do to the model of ``checkpoint``, without reading any weights.

    Args:
        checkpoint: directory or Hub id; plain or encoded.
        stack: the plugins to apply; ``None`` applies none.
        dtype, auto_class: see :func:`~arctic_plugins_huggingface.load_model`.
        checked: whether the caller has already checked the files with
            :func:`~arctic_plugins_huggingface.files.check.check_checkpoint`, except for their contents, which
            ``load_model`` then compares.
        new_tokens: see :func:`~arctic_plugins_huggingface.load_model`.
        **kwargs: further arguments of ``from_pretrained``.

    Raises:
        UserError: raised for everything that is known to fail before weights are read: unsupported host versions, a
            damaged checkpoint, settings that plugins refuse, conflicting claims, or an encoded checkpoint that the
            stack would encode differently.
    """
    register()
    stack = stack or Stack()
    stack.check_host("transformers")
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "training is configured for DeepSpeed's ZeRO stage 3, which splits weights while they are loaded",
            expected="stage 1 or 2; plugins can spread frozen weights ('placement') and experts ('experts_dispatch')",
            fix="correct zero_optimization.stage",
        )
    devices = kwargs.get("device_map")
    if isinstance(devices, Mapping) and "disk" in devices.values() and stack.only("adapter"):
        raise ConfigError(
            "device_map puts modules on 'disk', where PEFT (0.21) leaves new adapters without values",
            expected="no adapter",
            fix="use the plugin 'offload' instead of device_map, or merge the adapter first",
        )
    kwargs.setdefault("trust_remote_code", False)
    if "gguf_file" not in kwargs:
        kwargs.setdefault("use_safetensors", True)  # never a pickle unless the user asks for one
    if not checked:
        kwargs = check_checkpoint(checkpoint, **kwargs)
    config = kwargs.pop("config", None) or load_config(checkpoint, **only_hub(kwargs))
    _set_labels(config, {name: kwargs.pop(name) for name in LABELS if name in kwargs})
    stored = stored_dtype(config)
    computes, why = resolve_dtype(stored, dtype, device_of(kwargs))
    changes = configured(config, stack)
    warnings = stack.validate(config, "cuda" if torch.cuda.is_available() else "cpu")
    _check_quantization(config, stack)
    auto_class = auto_class or auto_class_of(config)
    model = skeleton(config, computes, auto_class=auto_class, trust_remote_code=kwargs["trust_remote_code"])
    weights = plan_weights(model, config, stack, stored if dtype == "auto" else computes)
    if "state_dict" not in kwargs:
        _check_files(Path(checkpoint) / kwargs.get("subfolder", ""), config, weights, kwargs.get("variant"))
    _check_experts(kwargs.get("experts_implementation"), weights)
    return ModelPlan(
        checkpoint=str(checkpoint),
        auto_class=auto_class,
        stack=stack,
        config=config,
        changes=changes,
        weights=weights,
        skeleton=model,
        stored_dtype=stored,
        asked_dtype=dtype,
        dtype=computes,
        dtype_reason=why,
        warnings=tuple(warnings),
        load=kwargs,
        contents_checked=not checked,
        new_tokens=tuple(new_tokens),
    )


def _set_labels(config: PreTrainedConfig, labels: Mapping[str, Any]) -> None:
    """Change the labels of ``config`` in place, as ``from_pretrained`` does with these arguments.

    Raises:
        ConfigError: a value is not valid.
    """
    given = dict(labels)
    try:
        if (names := given.get("id2label")) is not None:
            if not isinstance(names, Mapping) or len(names) > MOST_LABELS:
                raise TypeError("id2label has to map numbers to labels")
            named = {int(number): str(label) for number, label in names.items()}
            given = {"label2id": {label: number for number, label in named.items()}, **given, "id2label": named}
        for name in LABELS:  # num_labels first: id2label replaces the names that it makes up
            if name in given:
                setattr(config, name, given[name])
    except Exception as error:  # configs check their fields
        raise ConfigError(
            f"the labels are not valid: {one_line(error)}", fix=f"correct {', '.join(labels)} under load"
        ) from error


def configured(config: PreTrainedConfig, stack: Stack) -> dict[str, Any]:
    """Change ``config`` in place as ``stack`` requires, and return the changes: key of ``config.json`` -> value."""
    before = config.to_dict()
    stack.hf_configure_model(config)
    return {key: value for key, value in config.to_dict().items() if key not in before or before[key] != value}


def planned_config(checkpoint: str | Path, stack: Stack, **kwargs: Any) -> dict[str, Any]:
    """Return the changes that ``stack`` would make to the ``config.json`` of a plain checkpoint: key -> value.

    ``checkpoint`` is a directory or Hub id. No weights are read.

    Raises:
        ConfigError: ``stack`` changes nothing, or the checkpoint is already quantized.
        UserError: see :func:`plan_model`.
    """
    kwargs = check_checkpoint(checkpoint, **kwargs)
    config = load_config(checkpoint, **only_hub(kwargs))
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{checkpoint} is already quantized", expected="a plain checkpoint", fix="leave out the plugins"
        )
    part = stack.without("placement", "experts_dispatch")
    plan = plan_model(checkpoint, part, checked=True, config=config, **kwargs)
    changes = dict(plan.changes)
    if (quantization := plan.weights.quantization()) is not None:
        changes["quantization_config"] = quantization.to_dict()
    if not changes:
        raise ConfigError(
            "the plugins change nothing in this model",
            expected="a plugin that fills 'weight_codec' or 'rope'",
            fix="add one, for example fp8",
        )
    return changes


def plan_weights(
    model: PreTrainedModel, config: PreTrainedConfig, stack: Stack, plain_dtype: torch.dtype
) -> WeightPlan:
    """Return which weights of ``model`` the plugins of ``stack`` claim, and where they will be.

    Args:
        model: the plain model of ``config``, with or without data.
        config: specifies which weights are already encoded.
        stack: the plugins to apply.
        plain_dtype: dtype of weights that are placed without being encoded.

    Raises:
        ClaimError: plugins conflict, or the stack would encode weights differently from an encoded checkpoint.
        UserError: raised by a placement's plan.
    """
    specs = weight_specs(model)
    names = stored_names(model, specs)
    claimed = stack.claim(config, specs)
    codecs: dict[str, Codec] = claimed.exclusive("weight_codec")
    renamed: Renamed = str
    if is_encoded(config):
        quantization = config.quantization_config
        existing = ModuleCodecs.from_config(
            quantization if isinstance(quantization, Mapping) else quantization.to_dict()
        )
        renamed = in_checkpoint(model, existing, names)
        codecs = _checked_codecs(existing, stored_codecs(existing, names, renamed), codecs, specs)
    elif not codecs:
        # Placements move plain weights as well. The output head stays where it is, as it does when a codec encodes
        # the other weights.
        heads = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
        plain = PlainCodec(dtype_name(plain_dtype))
        codecs = {
            name: plain
            for name in specs
            if name in claimed.by_slot.get("placement", {}) and not specs[name].tied and name not in heads
        }
    placements, resident = _place(claimed, codecs, specs)
    elements = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    dispatches = claimed.exclusive("experts_dispatch")
    return WeightPlan(specs, claimed, codecs, names, placements, dispatches, resident, elements, renamed)


def _check_quantization(config: PreTrainedConfig, stack: Stack) -> None:
    """Raise ClaimError if the checkpoint is quantized by another method and ``stack`` encodes or places weights."""
    if is_quantized_otherwise(config) and (owners := [*stack.only("weight_codec"), *stack.only("placement")]):
        raise ClaimError(
            "the checkpoint is quantized by another method",
            expected="a plain checkpoint",
            fix=f"leave out the plugin '{owners[0].name}'",
        )


def _check_files(directory: Path, config: PreTrainedConfig, weights: WeightPlan, variant: str | None) -> None:
    """Check that the files of ``directory`` hold the tensors of the model."""
    if is_quantized_otherwise(config):
        return
    if files := sorted(directory.glob("*.safetensors")):
        check_elements(weights.elements, files, directory / "config.json")
    if is_encoded(config) and directory.is_dir():
        check_encoded(directory, weights.on_disk(), variant)


def _check_experts(implementation: str | None, weights: WeightPlan) -> None:
    """Raise ConfigError if the user sets a different experts function from the one that a dispatch needs."""
    wanted = {dispatch.experts_implementation for dispatch in weights.dispatches.values()}
    if wanted and implementation not in {None, *wanted}:
        raise ConfigError(
            f"experts_implementation is '{implementation}', but a plugin dispatches the experts",
            expected=f"'{min(wanted)}'",
            fix="leave it out",
        )


def _local(spec: LinearSpec, dispatch: ExpertsDispatch) -> tuple[int, ...]:
    """Return the shape of this process's share of the experts."""
    experts, *matrix = spec.shape
    part = dispatch.local(experts)
    return (part.stop - part.start, *matrix)


def _place(
    claims: SettledClaims, codecs: Mapping[str, Codec], specs: Mapping[str, LinearSpec]
) -> tuple[dict[str, Placement], dict[str, int]]:
    """Distribute the encoded weights among the placements that claim them.

    Return name -> placement, which may be a chain, and name -> bytes on the compute device.
    """
    dispatches = claims.exclusive("experts_dispatch")
    resident = {name: codec.nbytes(specs[name].shape) for name, codec in codecs.items()}
    for name in dispatches.keys() & resident.keys():
        resident[name] = codecs[name].nbytes(_local(specs[name], dispatches[name]))
    claimed = claims.by_slot.get("placement", {})
    position: dict[Placement, int] = {}  # in the chain: the stack's order, even for modules with only the later ones
    for placements in claimed.values():
        for index, placement in enumerate(placements):
            position[placement] = max(index, position.get(placement, 0))
    chains: dict[str, list[Placement]] = {}
    for placement in sorted(position, key=lambda placement: position[placement]):
        spread = dispatches if placement.collective else {}
        wanted = {name: resident[name] for name in codecs if placement in claimed.get(name, ()) and name not in spread}
        if not wanted:
            name = next(name for name, placements in claimed.items() if placement in placements)
            raise ClaimError(
                f"a placement claims weights such as {name}, but no encoded ones",
                expected="encoded weights",
                fix="correct its patterns",
            )
        left = placement.plan(wanted)
        for name, nbytes in left.items():
            chains.setdefault(name, []).append(placement)
            resident[name] = nbytes
    return {name: chain(placements) for name, placements in chains.items()}, resident


def _checked_codecs(
    existing: ModuleCodecs, found: dict[str, Codec], claimed: Mapping[str, Codec], specs: Mapping[str, LinearSpec]
) -> dict[str, Codec]:
    """Return the codecs ``found`` in an encoded checkpoint, which must match those that the stack claims, if any."""
    if claimed and claimed != found:
        name = next(name for name in specs if claimed.get(name) != found.get(name))
        raise ClaimError(
            f"the checkpoint has {found.get(name) or 'a plain weight'} for {name}, but the stack requires "
            f"{claimed.get(name) or 'a plain weight'}",
            fix="start from the plain checkpoint, or give the codec plugin the options used for this checkpoint",
        )
    if existing.modules and not found:
        raise CheckpointError(
            "quantization_config.modules matches no linear module of this model", fix="use the model's own config.json"
        )
    return found
