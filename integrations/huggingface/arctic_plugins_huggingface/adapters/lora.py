"""LoRA over frozen weights: PEFT layers that merge into the bytes of any codec. Read in peft 0.21.2."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import transformers_weight_conversion
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from arctic_plugins.adapter import WEIGHTS, AdapterConfig, adapted_modules, read_any_adapter
from arctic_plugins.errors import ArcticError, CheckpointError, CodecError, ConfigError, named
from arctic_plugins.files import tensor_shapes
from arctic_plugins.frozen.dispatch import local_parameters
from arctic_plugins.frozen.experts import FrozenExperts, Mixture, grouped_linear
from arctic_plugins.frozen.module import FrozenModule
from arctic_plugins.patches import patch, replaced
from arctic_plugins_huggingface.adapters.embeddings import add_embeddings, embedding_rows
from arctic_plugins_huggingface.adapters.layers import BeforeMerge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ExpertPairs",
    "FrozenLoraExperts",
    "check_experts",
    "expert_pairs",
    "expert_parameters",
    "load_adapter",
    "only_modules",
    "prepare_new_rows",
    "resize_embedding",
    "up_first",
    "with_frozen_experts",
]


class FrozenLoraExperts(ParamWrapper):
    """A LoRA layer over one weight of :class:`FrozenExperts`, with a pair of matrices per expert.

    Names and shapes are those of PEFT's ``ParamWrapper``, which would add the update to the whole weight in every
    forward pass. The experts call this layer with the rows of each expert, and it computes only experts with rows.
    Merging proceeds expert by expert; see :class:`FrozenLoraLinear`.
    """

    _before_merge: BeforeMerge | None = None
    base_layer: FrozenExperts | FrozenLoraExperts
    """The experts, or the layer over the other one of their weights."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        check_experts(adapter_name, config)
        super().__init__(base_layer, adapter_name, parameter_name, config, **kwargs)
        self.get_base_layer().updates[parameter_name] = self.update

    def get_base_layer(self) -> FrozenExperts:
        return cast("FrozenExperts", super().get_base_layer())

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        check_experts(adapter_name, config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        self.num_experts, out_features, in_features = self.get_base_layer().frozen[self.parameter_name].shape
        self._param_ndim = 3
        return out_features, in_features  # as in PEFT, whose update_layer swaps them

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._prepare(x, **kwargs)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def start(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Mixture:
        """Start a mixture; see :meth:`FrozenExperts.start`."""
        self._prepare(hidden_states)
        mixture: Mixture = self.base_layer.start(hidden_states, top_k_index, top_k_weights)
        return mixture

    def _prepare(self, x: Tensor, **kwargs: Any) -> None:
        self._check_forward_args(x, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()

    def update(self, product_RN: Tensor, rows_RK: Tensor, counts: Tensor) -> Tensor:
        """Return ``product + scaling * rows @ A[e].T @ B[e].T`` for active adapters, where ``e`` is a row's expert."""
        if self.disable_adapters or self.merged or not len(rows_RK):
            return product_RN
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                a_ErK, b_ENr = self._pairs(adapter)
                kind = rows_RK.device.type
                autocast = torch.is_autocast_enabled(kind)  # which does not know grouped products
                rows = rows_RK.to(torch.get_autocast_dtype(kind) if autocast else a_ErK.dtype)
                inner = grouped_linear(rows, a_ErK, counts) * self.scaling[adapter]
                product_RN = product_RN + grouped_linear(inner, b_ENr.contiguous(), counts).to(product_RN.dtype)
        return product_RN

    def _pairs(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return ``A [E, r, K]`` and ``B [E, N, r]``."""
        a, b = (ExpertPairs(self.r[adapter], last) for last in (False, True))
        halves = cast("nn.Linear", self.lora_A[adapter]), cast("nn.Linear", self.lora_B[adapter])
        return a.split(halves[0].weight), b.split(halves[1].weight)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge as PEFT does, with the memory of one decoded expert."""
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not adapters:
            return
        frozen, leaf = self.get_base_layer(), self.parameter_name
        weight, now, device = frozen.frozen[leaf], frozen.export(leaf), self.get_param().device
        before = BeforeMerge.of(frozen, leaf, self._before_merge)
        after = {suffix: torch.empty_like(buffer, device=device) for suffix, buffer in now.items()}
        pairs = {name: self._pairs(name) for name in adapters}
        for expert in range(self.num_experts):
            own = {suffix: buffer[expert].to(device) for suffix, buffer in now.items()}
            merged = weight.codec.decode(own, weight.shape[1:], torch.float32)
            for name, (a_ErK, b_ENr) in pairs.items():
                merged.addmm_(b_ENr[expert].float(), a_ErK[expert].float(), alpha=self.scaling[name])
            with named(f"{weight.name}, expert {expert}", CodecError):
                encoded = weight.codec.encode(merged)
            for suffix, buffer in encoded.items():
                after[suffix][expert] = buffer
        frozen.hold(after, leaf)
        self._before_merge = before.merged(frozen, leaf)
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Restore the bytes from before the first merge, which undoes all merged adapters at once."""
        if self._before_merge is not None:
            self._before_merge.give_back(self.get_base_layer(), self.parameter_name)
            self._before_merge = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        frozen: FrozenExperts = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        frozen.updates.clear()
        return frozen


# PEFT 0.21.2 recognizes wrappers that can be nested, and reused for another adapter, by the name of their class
# (tuners/tuners_utils.py).
FrozenLoraExperts.__name__ = ParamWrapper.__name__


@dataclass(frozen=True)
class ExpertPairs:
    """PEFT's layout, in ``ParamWrapper``, of an adapter parameter with a matrix per expert, in memory and on disk."""

    rank: int
    last: bool
    """Whether the expert's number varies fastest: True for ``lora_B [N, r * E]``, False for ``lora_A [E * r, K]``."""

    def split(self, tensor: Tensor) -> Tensor:
        """Return a view with one matrix per expert: ``[E, N, r]`` or ``[E, r, K]``."""
        return (
            tensor.unflatten(1, (self.rank, -1)).permute(2, 0, 1) if self.last else tensor.unflatten(0, (-1, self.rank))
        )

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the parameter of all experts, given the parts that the processes hold."""
        return (
            torch.cat([part.unflatten(1, (self.rank, -1)) for part in parts], 2).flatten(1)
            if self.last
            else torch.cat(list(parts))
        )

    def part(self, whole: Tensor, experts: slice) -> Tensor:
        """Return the parameter of these ``experts``, given that of all experts."""
        if self.last:
            return whole.unflatten(1, (self.rank, -1))[:, :, experts].flatten(1)
        return whole.unflatten(0, (-1, self.rank))[experts].flatten(0, 1)


def expert_pairs(model: nn.Module) -> dict[str, ExpertPairs]:
    """Map the name of every parameter that adapters add to the experts of a model to its layout.

    In all other parameters with an entry per expert, the first dimension is the expert's number.
    """
    return {
        f"{name}.{half}.{adapter}.weight": ExpertPairs(rank, half == "lora_B")
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper) and module._param_ndim == 3
        for adapter, rank in module.r.items()
        for half in ("lora_A", "lora_B")
        if adapter in module.lora_A
    }


_EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def expert_parameters(model: nn.Module) -> list[str]:
    """Return the weights of experts for PEFT's ``target_parameters``, by their names in a layer.

    For example ``mlp.experts.down_proj``.
    """
    found = set[str]()
    for name, module in model.named_modules():
        if isinstance(module, FrozenExperts):
            leaves = list(module.frozen)
        elif isinstance(module, FrozenModule):
            continue
        else:
            leaves = [
                leaf
                for leaf, parameter in module.named_parameters(recurse=False)
                if leaf in _EXPERT_WEIGHTS and parameter.dim() == 3
            ]
        found |= {re.sub(r"^.*\.\d+\.", "", f"{name}.{leaf}") for leaf in leaves}
    return sorted(found)


_NOT_OF_EXPERTS = (
    "lora_dropout",
    "fan_in_fan_out",
    "lora_bias",
    *(field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant")),
)
_STARTS_OF_EXPERTS = (True, False, "gaussian")
"""Values of ``init_lora_weights`` that do not look at the weights, which PEFT cannot read in experts."""


def check_experts(adapter_name: str, config: LoraConfig) -> None:
    """Raise ConfigError unless the adapter is one that PEFT supports for experts: a product per expert."""
    found = next((name for name in _NOT_OF_EXPERTS if getattr(config, name, None)), None)
    if found is None and config.init_lora_weights not in _STARTS_OF_EXPERTS:
        found = "init_lora_weights"
    if found is not None:
        raise ConfigError(
            f"adapter '{adapter_name}' has {found}={getattr(config, found)!r} and adapts experts",
            expected="LoRA or rsLoRA, initialized at random, for experts",
            fix="leave the option out, or adapt only linear modules",
        )


@contextmanager
def only_modules(model: nn.Module, *, always: bool = False) -> Iterator[None]:
    """Keep PEFT from adapting fused parameters that ``target_parameters`` does not name, for the duration of the block.

    This applies to a ``model`` with encoded experts; with ``always``, also if no experts are encoded. In mixtures of
    experts, PEFT (utils/transformers_weight_conversion.py) takes 'all-linear', and names such as ``gate_proj``, to mean
    the fused parameters that hold the weights which had these names in transformers 4.
    """
    with _without_bitsandbytes(), _only_modules(model, always):
        yield


@contextmanager
def _only_modules(model: nn.Module, always: bool) -> Iterator[None]:
    experts = [module for module in model.modules() if isinstance(module, FrozenExperts)]
    if not experts and not always:
        yield
        return
    up_first(model)
    with _without_conversion():
        yield


def up_first(model: nn.Module) -> None:
    """Put the parameters of encoded experts, loaded in any order, in the order in which PEFT nests its layers."""
    for module in model.modules():
        if isinstance(module, FrozenExperts):
            names = sorted(module._parameters, key=lambda name: not name.startswith(module.up))
            module._parameters = {name: module._parameters[name] for name in names}


@contextmanager
def _without_conversion() -> Iterator[None]:
    with replaced(
        transformers_weight_conversion,
        "convert_peft_config_for_transformers",
        lambda *_, **__: None,
        why="it takes module names in encoded experts to mean fused parameters, and no option turns it off",
        read_in="peft 0.21.2",
    ):
        yield


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Keep PEFT (tuners/lora/model.py) from importing bitsandbytes, which takes seconds, just to check for its layers.

    While bitsandbytes has not been executed, no layer can be one of its layers.
    """
    if type(sys.modules.get("bitsandbytes")) is ModuleType:
        yield
        return
    why = "importing bitsandbytes takes seconds, and until it is imported no layer can be one of its layers"
    with ExitStack() as stack:
        for name in ("is_bnb_available", "is_bnb_4bit_available"):
            absent = cache(lambda: False)  # cached, like PEFT's
            stack.enter_context(replaced(lora_model, name, absent, why=why, read_in="peft 0.21.2"))
        yield


def with_frozen_experts(config: LoraConfig) -> None:
    """Make PEFT put :class:`FrozenLoraExperts` over encoded experts. This is not saved with the adapter."""
    config._register_custom_module({FrozenExperts: FrozenLoraExperts})


def prepare_new_rows(adapted: PeftModel) -> PeftModel:
    """Prepare an adapter that trains the rows of new tokens, and return it.

    Only these rows are saved, not the whole embedding and head. And the head has the attribute ``bias`` of a linear
    layer, which TRL's fused head reads (``add_fused_lm_head``, trl 1.16.0), but PEFT's wrapper of it lacks.
    """
    for module in adapted.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.register_parameter("bias", None)

    @patch(
        adapted,
        "save_pretrained",
        why="it saves all embeddings if their number differs from the base model's; the adapter holds the new rows",
        read_in="peft 0.21.2",
    )
    def save_pretrained(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(*args, **{"save_embedding_layers": False, **kwargs})

    return adapted


def _add_embeddings(model: PreTrainedModel, adapter: str | Path, tokens: frozenset[int]) -> bool:
    """Add embeddings for ``tokens``, whose rows ``adapter`` holds, and return whether any were without one.

    Raises:
        CheckpointError: the adapter has no rows for other tokens that would get embeddings.
    """
    rows = embedding_rows(model) or 0
    if not tokens or max(tokens) < rows:
        return False
    if not tokens.issuperset(range(rows, max(tokens) + 1)):
        raise CheckpointError(
            f"{adapter} trains the token {max(tokens)}, but its base model has {rows} embeddings",
            expected="rows for all tokens in between",
            fix="use the model that the adapter was trained on",
        )
    add_embeddings(model, tokens)
    return True


def load_adapter(model: PreTrainedModel, adapter: str | Path, *, trainable: bool = False) -> PeftModel:
    """Load the PEFT adapter in the directory ``adapter`` onto ``model``, ready to be merged whatever the codec.

    If the adapter holds an embedding with more or fewer tokens, the model's is resized.

    Raises:
        CheckpointError: the adapter does not match the model, or lacks a tensor (PEFT would only warn).
        ConfigError: the embedding is to be resized, and the output head is encoded.
    """
    try:
        found = read_any_adapter(adapter)
        is_lora = isinstance(found, AdapterConfig)
        config = PeftConfig.from_pretrained(str(adapter))
        if is_lora:
            # The initialization, which may decompose the base weight, is not repeated. MiCA's also freezes a matrix.
            if not (trainable and config.init_lora_weights == "mica"):
                config.init_lora_weights = True
            # Strings are regular expressions, which PEFT would evaluate.
            if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
                config.target_modules, config.exclude_modules = adapted_modules(adapter), None
        saved = tensor_shapes(Path(adapter) / WEIGHTS)
        grown = isinstance(found, AdapterConfig) and _add_embeddings(model, adapter, found.trained_tokens)
        resize_embedding(model, adapter)
        with only_modules(model, always=bool(getattr(config, "target_parameters", None))):
            if local_parameters(model):
                adapted = _load_local(model, adapter, config, trainable=trainable)
            else:
                adapted = PeftModel.from_pretrained(model, str(adapter), config=config, is_trainable=trainable)
    except ArcticError:
        raise
    except Exception as error:  # a damaged file can make PEFT raise anything
        text = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"{adapter} cannot be loaded onto its base model: {type(error).__name__}: {text}",
            fix="it is damaged or belongs to another model: train it again",
        ) from error
    if missing := get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - saved.keys():
        raise CheckpointError(
            f"{adapter} lacks {len(missing)} tensors, for example {min(missing)}",
            fix="the adapter is incomplete: save it again",
        )
    return prepare_new_rows(adapted) if grown else adapted


def resize_embedding(model: PreTrainedModel, adapter: str | Path) -> None:
    """Give the embedding of ``model`` as many rows as that of the adapter, if the adapter holds a whole one.

    PEFT saves it with the adapter if it was resized for training (``save_embedding_layers``).

    Raises:
        CheckpointError: the adapter holds an embedding of another width, or lacks a head that is not tied to it.
        ConfigError: the output head is encoded.
        OSError, safetensors.SafetensorError: the adapter's weights cannot be read.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    saved = tensor_shapes(Path(adapter) / WEIGHTS)
    name, shape = _saved_as(model, embedding, saved)
    now = tuple(cast("Tensor", embedding.weight).shape)
    if shape is None or shape == now:
        return
    if shape[1:] != now[1:]:
        raise CheckpointError(
            f"{adapter} holds a {name} of shape {shape}",
            expected=f"(tokens, {now[1]}), as in the model",
            fix="it belongs to another model: pass --base",
        )
    if isinstance(head, FrozenModule):
        raise ConfigError(
            f"{adapter} holds a {name} with {shape[0]} tokens instead of {now[0]}, but the output head is encoded",
            expected="a plain head, which can be resized",
            fix="exclude the head from the codec",
        )
    if head is not None and head.weight is not embedding.weight and _saved_as(model, head, saved)[1] is None:
        raise CheckpointError(
            f"{adapter} holds a {name} with {shape[0]} tokens instead of {now[0]}, but no output head of that size",
            expected="both, which PEFT saves unless the embedding is in target_modules",
            fix="train it again with the embedding in modules_to_save or trainable_token_indices",
        )
    model.resize_token_embeddings(shape[0], mean_resizing=False)
    if (key := f"base_model.model.{name}.base_layer.weight") in saved:  # a head tied to it needs it as well
        with safe_open(Path(adapter) / WEIGHTS, "pt") as file:
            cast("Tensor", model.get_input_embeddings().weight).data.copy_(file.get_tensor(key))


def _saved_as(
    model: nn.Module, module: nn.Module, saved: Mapping[str, tuple[int, ...]]
) -> tuple[str, tuple[int, ...] | None]:
    """Return the name of ``module`` and the shape of its whole weight in an adapter; None if the adapter has none."""
    name = next(name for name, found in model.named_modules() if found is module)
    keys = f"base_model.model.{name}.weight", f"base_model.model.{name}.base_layer.weight"
    return name, next((saved[key] for key in keys if key in saved), None)


def _load_local(model: PreTrainedModel, adapter: str | Path, config: PeftConfig, *, trainable: bool) -> PeftModel:
    """Load the adapter of all experts onto a model that holds only some of them."""
    config.inference_mode = not trainable
    adapted = get_peft_model(model, config)
    state, layouts = load_file(Path(adapter) / WEIGHTS), expert_pairs(adapted)
    for name, (_, dispatch) in local_parameters(adapted).items():
        key = name.replace(f".{adapted.active_adapter}.weight", ".weight")
        if name in layouts and key in state:
            experts = layouts[name].split(state[key]).shape[0]
            state[key] = layouts[name].part(state[key], dispatch.local(experts))
    set_peft_model_state_dict(adapted, state)
    return adapted
