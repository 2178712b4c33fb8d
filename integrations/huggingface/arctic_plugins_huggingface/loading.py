"""Loading: a checkpoint and a stack become a model, encoded tensor by tensor as the bytes come off the disk."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from arctic_plugins.claims import Claims, LinearSpec, compress_names
from arctic_plugins.compute import compute_dtype, default_device, dtype_name, reason_for, warning_for
from arctic_plugins.errors import ArcticError, CheckpointError, ClaimError, ConfigError
from arctic_plugins.files import check_elements, check_keys, check_sizes, read_json
from arctic_plugins.frozen import (
    METHOD,
    Codec,
    ExpertsDispatch,
    FrozenModule,
    ModuleCodecs,
    Placement,
    PlainCodec,
    chain,
)
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.checkpoints import check_checkpoint, check_encoded, hub_arguments, reason
from arctic_plugins_huggingface.modules import (
    expert_conversions,
    freeze_modules,
    frozen_weights,
    plain_experts,
    split_weight,
    stored_codecs,
    stored_names,
    stored_shapes,
    weight_conversions,
    weight_specs,
)
from arctic_plugins_huggingface.quantizer import ArcticQuantizationConfig, ArcticQuantizer, register

__all__ = [
    "STORED",
    "claims",
    "configured",
    "freeze",
    "is_encoded",
    "load_config",
    "load_model",
    "load_tokenizer",
    "only_hub",
    "planned_config",
    "resolve_dtype",
    "skeleton",
    "stored_dtype",
]

logger = logging.getLogger(__name__)


def load_model(
    checkpoint: str | Path,
    stack: Stack | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model through ``stack``: configured, encoded and transformed by its plugins.

    Args:
        checkpoint: directory or hub id; plain, or encoded by :func:`~arctic_plugins_huggingface.save_checkpoint`.
        stack: what to apply; ``None`` applies nothing, and loads an encoded checkpoint as it is.
        dtype: compute dtype, and that of what is not encoded; ``"auto"`` is the checkpoint's where the device
            multiplies it natively, otherwise float32 (:mod:`arctic_plugins.compute`); :data:`STORED` the checkpoint's
            in any case, for what is not computed with. :func:`~arctic_plugins_huggingface.save_checkpoint` writes what
            ``"auto"`` made wider in the checkpoint's dtype again.
        tokenizer: the checkpoint's, if it was loaded already.
        **kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` verbatim.

    Returns:
        The model (a ``PeftModel`` if a plugin adds an adapter), in evaluation mode, and its tokenizer.

    Raises:
        UserError: everything that can be known to fail is raised before weights are read: host versions, clashing
            claims, an encoded checkpoint that the stack would encode differently.
        CheckpointError: weights are missing, or a tensor does not fit.
    """
    register()
    stack = stack or Stack()
    stack.check_host("transformers")
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "training is configured for DeepSpeed's ZeRO stage 3, which splits weights while they are loaded",
            expected="stage 1 or 2; the 'shard' plugin spreads frozen weights, 'moe' experts",
            fix="correct zero_optimization.stage",
        )
    kwargs.setdefault("trust_remote_code", False)
    if "gguf_file" not in kwargs:
        kwargs.setdefault("use_safetensors", True)  # never a pickle unless the user asks for one
    kwargs = check_checkpoint(checkpoint, **kwargs)
    config = kwargs.pop("config", None) or load_config(checkpoint, **only_hub(kwargs))
    tokenizer = tokenizer or load_tokenizer(checkpoint, **only_hub(kwargs))
    stored, asked_dtype = stored_dtype(config), dtype
    dtype, line = resolve_dtype(stored, dtype, _device_of(kwargs))
    if line:
        logger.warning(line)
    stack.hf_configure_model(config)
    for warning in stack.validate(config, "cuda" if torch.cuda.is_available() else "cpu"):
        logger.warning(warning)
    asked = kwargs.get("experts_implementation")
    quantization = _quantization(
        config, stack, asked_dtype, Path(checkpoint) / kwargs.get("subfolder", ""), kwargs.get("variant"), asked
    )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint, config=config, dtype=dtype, quantization_config=quantization, output_loading_info=True, **kwargs
        )
    except (ArcticError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what a damaged file does to the loader can be anything
        if (
            quantization is not None and quantization.failure is not None
        ):  # the loader collects errors and reports that there were some
            raise quantization.failure from error
        raise CheckpointError(
            f"{checkpoint} cannot be loaded: {reason(error)}", fix="'--traceback' shows more"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{checkpoint} lacks {len(missing)} weights of its model, {missing[0]} for one",
            fix="the checkpoint is incomplete: make it again",
        )
    _forget_empty_quantization(model)
    model.arctic_stored_dtype = stored if asked_dtype == "auto" and stored != dtype else None
    if any(module.frozen[leaf].handle is not None for module, leaf in frozen_weights(model).values()):
        _let_go_of_files(model)
    for line in encoding_report(model):
        logger.info("%s", line)
    return stack.hf_transform_model(model), tokenizer


def _forget_empty_quantization(model: PreTrainedModel) -> None:
    """The loader was told to keep some experts only, and nothing is encoded or placed: the model is a plain one, which
    can be trained as it is.
    """
    quantization = getattr(model.config, "quantization_config", None)
    if isinstance(quantization, ArcticQuantizationConfig) and not quantization.codecs.modules:
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        del model.quantization_method


@torch.no_grad()
def _let_go_of_files(model: nn.Module) -> None:
    """Copy what is still mapped from the checkpoint: one small tensor keeps all of its file mapped, and what was read
    of it in memory.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def encoding_report(model: nn.Module) -> list[str]:
    """A line for every weight and how it is encoded; layers that are encoded alike share one."""
    kinds: dict[str, str] = {}
    for name, spec in weight_specs(model).items():
        path, leaf = split_weight(name, spec)
        module = model.get_submodule(path)
        frozen = module.frozen.get(leaf) if isinstance(module, FrozenModule) else None
        kinds[name] = f"plain {getattr(module, leaf).dtype}" if frozen is None else frozen.codec.describe()
        if frozen is not None and frozen.placement is not None:
            kinds[name] += f", {frozen.placement.describe()}"
    kinds |= {name: f"plain, {why}" for name, why in plain_experts(model).items()}
    return [f"{pattern}: {kind}" for pattern, kind in compress_names(kinds, kinds).items()]


def load_config(checkpoint: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """Read the config of a checkpoint directory or hub id.

    Raises:
        CheckpointError: there is none, or it is not a model's.
    """
    register()
    directory, where = Path(checkpoint) / kwargs.get("subfolder", ""), f"{checkpoint}/config.json"
    try:
        content, _ = PreTrainedConfig.get_config_dict(checkpoint, **kwargs)
        check_keys(content, where)
        check_sizes(content, sorted(directory.glob("*.safetensors")) if directory.is_dir() else (), where)
        config = AutoConfig.from_pretrained(checkpoint, **{"trust_remote_code": False, **kwargs})
    except ArcticError:
        raise
    except Exception as error:  # configs are code: a bad value can raise anything
        _own_code(checkpoint, error)
        raise CheckpointError(
            f"{where} cannot be read as a model: {reason(error)}",
            expected="a causal language model",
            fix="correct the key it names",
        ) from error
    return config


def load_tokenizer(checkpoint: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a checkpoint directory or hub id; raises CheckpointError when there is none or it is
    damaged.
    """
    path = Path(checkpoint) / kwargs.get("subfolder", "") / "tokenizer_config.json"
    if path.is_file():
        _check_tokenizer(path)
    try:
        return AutoTokenizer.from_pretrained(checkpoint, **{"trust_remote_code": False, **kwargs})
    except BaseException as error:  # tokenizers raises bare Exceptions, and of a panic of its Rust code a BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        _own_code(checkpoint, error)
        raise CheckpointError(
            f"the tokenizer of {checkpoint} cannot be read: {reason(error)}", fix="save it beside the model again"
        ) from error


def _check_tokenizer(path: Path) -> None:
    """Raise CheckpointError if a ``tokenizer_config.json`` names a class of transformers that is no tokenizer, or
    another file.
    """
    config = read_json(path)
    named = config.get("tokenizer_class")
    if named is not None and not re.fullmatch(r"\w*(Tokenizer|TokenizerFast|Backend)", str(named)):
        raise CheckpointError(
            f"{path} has tokenizer_class {named!r}", expected="the name of a tokenizer", fix="correct it"
        )
    if config.get("sp_model_kwargs"):
        raise CheckpointError(
            f"{path} has sp_model_kwargs", expected="none: they name files", fix="remove them, if you trust the rest"
        )


def _own_code(checkpoint: str | Path, error: BaseException) -> None:
    """Say what to set if the error is that the checkpoint brings code of its own; the library's default would be to ask
    on the terminal.
    """
    if "trust_remote_code" in str(error):
        raise CheckpointError(
            f"{checkpoint} brings code of its own, which is not executed",
            expected="a model that transformers or a plugin knows",
            fix="read the code, and if you trust it set load: {trust_remote_code: true} in the recipe",
        ) from error


STORED = "stored"
"""As ``dtype``: that of the checkpoint, whatever the device; for a model that is saved again and not computed with."""


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint says it has."""
    found = getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def resolve_dtype(
    stored: torch.dtype, dtype: torch.dtype | str | None = "auto", device: str | None = None
) -> tuple[torch.dtype, str]:
    """What ``dtype`` stands for with a checkpoint in ``stored``, and a line to tell where that is not the obvious.

    Raises:
        ConfigError: ``dtype`` is not the name of a floating dtype.
    """
    if dtype in ("auto", None):
        chosen = compute_dtype(stored, device)
        return chosen, reason_for(stored, chosen, device)
    if dtype == STORED:
        return stored, ""
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ConfigError(
            f"dtype is {dtype!r}",
            expected="'auto', or the name of a floating dtype such as 'float32'",
            fix="correct load.dtype",
        )
    return named, warning_for(named, "dtype", "leave it out, or say float32", device)


def _device_of(kwargs: Mapping[str, Any]) -> str:
    """Where the model will be computed: where ``device_map`` puts it, else where the Trainer does, on the accelerator
    if there is one.
    """
    device_map = kwargs.get("device_map")
    if isinstance(device_map, (str, torch.device)) and str(device_map) not in (
        "auto",
        "balanced",
        "balanced_low_0",
        "sequential",
    ):
        return torch.device(device_map).type
    return default_device()


def is_encoded(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint of ``config`` holds weights encoded by this project."""
    quantization = getattr(config, "quantization_config", None)
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, Mapping)
        else getattr(quantization, "quant_method", None)
    )
    return method == METHOD


def freeze(model: PreTrainedModel, stack: Stack) -> PreTrainedModel:
    """Encode a loaded, plain model in place, one module at a time, as loading it through ``stack`` would have done.

    Raises:
        ClaimError: see :meth:`arctic_plugins.stack.Stack.claim`.
        CodecError: a weight holds NaN or Inf; names it.
    """
    register()
    specs = weight_specs(model)
    stored = stored_names(model, specs)
    claimed = stack.claim(model.config, specs)
    codecs = claimed.exclusive("weight_codec")
    if claimed.by_slot.get("experts_dispatch"):
        raise ClaimError(
            "experts are spread over processes while they are loaded",
            expected="load_model(checkpoint, stack)",
            fix="use it",
        )
    if not codecs:
        return model
    quantization = ArcticQuantizationConfig.from_owners(*_owners(codecs, stored), _place(claimed, codecs, specs)[0])
    quantizer = ArcticQuantizer(quantization)
    quantizer.codecs = stored_codecs(quantization.codecs, stored)
    plain_conversions = weight_conversions(model)
    freeze_modules(model, quantizer.codecs, quantization.placements, until_encoded=True)
    for module, leaf in frozen_weights(model).values():
        module.encode(module.get_parameter(leaf), leaf)
    # What from_pretrained would have left behind: save_pretrained, the Trainer and PEFT look for these.
    model._weight_conversions = expert_conversions(plain_conversions)
    model.config.quantization_config = quantization
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    return model


def _quantization(
    config: PreTrainedConfig,
    stack: Stack,
    dtype: torch.dtype | str,
    directory: Path,
    variant: str | None,
    experts_implementation: str | None,
) -> ArcticQuantizationConfig | None:
    """What the stack claims of this model; for an encoded checkpoint, nothing but the check that it claims the same."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not is_encoded(config):
        if owners := [*stack.only("weight_codec"), *stack.only("placement")]:
            raise ClaimError(
                "the checkpoint is quantized by another method",
                expected="a plain checkpoint",
                fix=f"leave the plugin '{owners[0].name}' out",
            )
        return None
    claimed = claims(config, stack, dtype)
    if weights := sorted(directory.glob("*.safetensors")):
        check_elements(claimed.elements, weights, directory / "config.json")
    wanted = {dispatch.experts_implementation for dispatch in claimed.dispatches.values()}
    if wanted and experts_implementation not in {None, *wanted}:
        raise ConfigError(
            f"experts_implementation is '{experts_implementation}', and a plugin dispatches experts",
            expected=f"'{min(wanted)}'",
            fix="leave it out",
        )
    if quantization is not None:
        if directory.is_dir():
            check_encoded(directory, claimed.on_disk(), variant)
        # The host builds its quantizer from this dict; an argument of from_pretrained it would only compare.
        stored = ModuleCodecs.from_owners(*_owners(claimed.codecs, claimed.stored)).to_config()
        config.quantization_config = {**stored, "placements": claimed.placements, "dispatches": claimed.dispatches}
        return None
    return claimed.quantization()


def configured(config: PreTrainedConfig, stack: Stack) -> dict[str, Any]:
    """What ``stack`` changes in ``config``, which is changed: key of ``config.json`` -> value."""
    before = config.to_dict()
    stack.hf_configure_model(config)
    return {key: value for key, value in config.to_dict().items() if key not in before or before[key] != value}


def planned_config(checkpoint: str | Path, stack: Stack, **kwargs: Any) -> dict[str, Any]:
    """What ``config.json`` of the plain ``checkpoint`` (directory or hub id) would say otherwise had ``stack`` been
    applied; reads no weights.

    Raises:
        ConfigError: ``stack`` changes nothing, or the checkpoint is quantized already.
        ClaimError: see :meth:`arctic_plugins.stack.Stack.claim`.
    """
    kwargs = check_checkpoint(checkpoint, **kwargs)
    config = load_config(checkpoint, **only_hub(kwargs))
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{checkpoint} is quantized already", expected="a plain checkpoint", fix="leave the plugins out"
        )
    changes = configured(config, stack)
    quantization = claims(config, stack.without("placement", "experts_dispatch")).quantization()
    if quantization is not None:
        changes["quantization_config"] = quantization.to_dict()
    if not changes:
        raise ConfigError(
            "the plugins change nothing of this model",
            expected="a plugin that fills 'weight_codec' or 'rope'",
            fix="fp8, for instance",
        )
    return changes


def _owners(codecs: Mapping[str, Codec], stored: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, Codec], list[str]]:
    """A checkpoint's module name -> codec, and the names of all of its modules."""
    return {part: codec for name, codec in codecs.items() for part in stored[name]}, [
        part for parts in stored.values() for part in parts
    ]


def _local(spec: LinearSpec, dispatch: ExpertsDispatch) -> tuple[int, ...]:
    """Shape of this process's part of experts."""
    experts, *matrix = spec.shape
    part = dispatch.local(experts)
    return (part.stop - part.start, *matrix)


def _place(
    claims: Claims, codecs: Mapping[str, Codec], specs: Mapping[str, LinearSpec]
) -> tuple[dict[str, Placement], dict[str, int]]:
    """Let the claimed placements choose among the encoded weights: name -> its (chain of) placement, and name -> bytes
    on the compute device.
    """
    dispatches = claims.exclusive("experts_dispatch")
    resident = {name: codec.nbytes(specs[name].shape) for name, codec in codecs.items()}
    for name in dispatches.keys() & resident.keys():
        resident[name] = codecs[name].nbytes(_local(specs[name], dispatches[name]))
    claimed = claims.by_slot.get("placement", {})
    position: dict[Placement, int] = {}  # in the chain: that of the stack, also where a module has only the later ones
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
                f"a placement is claimed for {name} and no other weight that is encoded",
                expected="encoded weights",
                fix="correct its patterns",
            )
        left = placement.plan(wanted)
        for name, nbytes in left.items():
            chains.setdefault(name, []).append(placement)
            resident[name] = nbytes
    return {name: chain(placements) for name, placements in chains.items()}, resident


@dataclass(frozen=True)
class Claimed:
    """What a stack claims of a model. Names are those of :func:`~arctic_plugins_huggingface.modules.weight_specs`."""

    specs: dict[str, LinearSpec]
    """Every weight that can be claimed."""
    claims: Claims
    codecs: dict[str, Codec]
    """The claimed ones, or those of an encoded checkpoint; when nothing is encoded, the plain one of every weight that
    a placement claims.
    """
    stored: dict[str, tuple[str, ...]]
    """Name -> the modules that hold it in a checkpoint."""
    placements: dict[str, Placement]
    """Of the encoded weights that are not resident."""
    dispatches: dict[str, ExpertsDispatch]
    """Of the experts that are spread over processes, or whose tokens may be dropped."""
    resident: dict[str, int]
    """Bytes of every encoded weight on the compute device, in this process."""
    elements: int
    """Of all tensors of the model, decoded."""

    def quantization(self) -> ArcticQuantizationConfig | None:
        """To load a plain checkpoint with; None when its weights stay as they are."""
        return (
            ArcticQuantizationConfig.from_owners(*_owners(self.codecs, self.stored), self.placements, self.dispatches)
            if self.codecs or self.dispatches
            else None
        )

    def on_disk(self) -> dict[str, tuple[Codec, tuple[int, int]]]:
        """Every encoded module of a checkpoint -> its codec and the weight's (N, K)."""
        shapes = {name: stored_shapes({name: self.specs[name]}, self.stored) for name in self.codecs}
        return {part: (self.codecs[name], shape) for name, parts in shapes.items() for part, shape in parts.items()}


def claims(config: PreTrainedConfig, stack: Stack, dtype: torch.dtype | str = "auto") -> Claimed:
    """What ``stack`` claims of the model of ``config``, loaded in ``dtype``.

    Raises:
        ClaimError: plugins clash, or the stack would encode otherwise what the checkpoint has encoded already.
        UserError: what a placement's plan raises.
    """
    stored = stored_dtype(config)  # building a model changes what the config says
    model = skeleton(config, dtype)
    specs = weight_specs(model)
    names = stored_names(model, specs)
    claimed = stack.claim(config, specs)
    codecs = claimed.exclusive("weight_codec")
    if is_encoded(config):
        codecs = _stored_codecs(config, codecs, specs, names)
    elif (
        not codecs
    ):  # placements move plain weights, too; the output head stays, as it does when a codec encodes the rest
        heads = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
        kept = stored if dtype == "auto" else model.dtype  # bytes as they are on disk, products in the compute dtype
        plain = PlainCodec(dtype_name(kept))
        codecs = {
            name: plain
            for name in specs
            if name in claimed.by_slot.get("placement", {}) and not specs[name].tied and name not in heads
        }
    placements, resident = _place(claimed, codecs, specs)
    elements = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    return Claimed(specs, claimed, codecs, names, placements, claimed.exclusive("experts_dispatch"), resident, elements)


def _stored_codecs(
    config: PreTrainedConfig,
    codecs: Mapping[str, Codec],
    specs: Mapping[str, LinearSpec],
    stored: Mapping[str, tuple[str, ...]],
) -> dict[str, Codec]:
    """The codecs of an encoded checkpoint, which have to be those that the stack claims, if it claims any."""
    quantization = config.quantization_config
    existing = ModuleCodecs.from_config(quantization if isinstance(quantization, Mapping) else quantization.to_dict())
    found = stored_codecs(existing, stored)
    if codecs and codecs != found:
        name = next(name for name in specs if codecs.get(name) != found.get(name))
        raise ClaimError(
            f"the checkpoint has {found.get(name) or 'a plain weight'} at {name}, but the stack wants "
            f"{codecs.get(name) or 'a plain weight'}",
            fix="start from the plain checkpoint, or give the codec plugin the options with which this one was made",
        )
    if existing.modules and not found:
        raise CheckpointError(
            "quantization_config.modules matches no linear module of this model", fix="config.json is of another model"
        )
    return found


def skeleton(config: PreTrainedConfig, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """The model of ``config`` on the meta device: shapes without data.

    Raises:
        CheckpointError: no causal language model can be built from it.
    """
    chosen = stored_dtype(config) if dtype is None else resolve_dtype(stored_dtype(config), dtype)[0]
    try:
        with torch.device("meta"):
            # A config whose class is the checkpoint's own code was loaded with trust_remote_code; without it, the
            # library would ask on the terminal.
            trusted = type(config).__module__.startswith("transformers_modules")
            return AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=trusted)
    except Exception as error:  # models are code: a bad size can raise anything
        raise CheckpointError(
            f"no causal language model can be built from config.json (model_type {config.model_type}): {reason(error)}",
            fix="correct config.json",
        ) from error


def only_hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``from_pretrained``'s arguments that also says where a config and a tokenizer come from."""
    return {
        **hub_arguments(kwargs),
        **{key: kwargs[key] for key in ("trust_remote_code", "gguf_file") if key in kwargs},
    }
