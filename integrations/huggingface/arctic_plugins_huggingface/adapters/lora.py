"""LoRA over frozen weights: PEFT layers that merge into the bytes of any codec. Read in peft 0.21.2."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import transformers_weight_conversion
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from arctic_plugins.adapter import WEIGHTS, adapted_modules, read_adapter
from arctic_plugins.errors import ArcticError, CheckpointError, CodecError, ConfigError, named
from arctic_plugins.frozen.dispatch import local_parameters
from arctic_plugins.frozen.experts import FrozenExperts, Mixture, grouped_linear
from arctic_plugins.frozen.linear import FrozenLinear
from arctic_plugins.frozen.module import FrozenModule
from arctic_plugins.patches import patch, replaced
from arctic_plugins_huggingface.adapters.embeddings import add_embeddings, embedding_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "VARIANTS",
    "ExpertPairs",
    "FrozenLoraExperts",
    "FrozenLoraLinear",
    "expert_pairs",
    "expert_parameters",
    "load_adapter",
    "only_modules",
    "prepare_new_rows",
    "with_frozen_layer",
]


@dataclass
class BeforeMerge:
    """A frozen weight as it was before an adapter was merged into it."""

    buffers: dict[str, Tensor]
    version: int
    bias: Tensor | None = None
    """The bias of the same layer, if the adapter changes it."""
    merged_version: int = 0
    """Version of the weight right after the merge, to detect whether another adapter has been merged since."""

    @classmethod
    def of(cls, frozen: FrozenModule, leaf: str = "weight", kept: BeforeMerge | None = None) -> BeforeMerge:
        """Record a weight before a merge, or return ``kept``, the record of an earlier one.

        Call :meth:`merged` after the merge.
        """
        if kept is not None:
            kept.check(frozen, leaf)
            return kept
        return cls(frozen.export(leaf), frozen.frozen[leaf].version)

    def merged(self, frozen: FrozenModule, leaf: str = "weight") -> BeforeMerge:
        """Record the version of the merged ``frozen`` weight, and return this object."""
        self.merged_version = frozen.frozen[leaf].version
        return self

    def check(self, frozen: FrozenModule, leaf: str = "weight") -> None:
        """Raise ArcticError if something else has changed the weight since the merge."""
        if frozen.frozen[leaf].version != self.merged_version:
            raise ArcticError(
                f"{frozen.frozen[leaf].name} was changed after an adapter had been merged into it",
                expected="adapters of several layers on one module to be unmerged in reverse order",
                fix="unmerge the other adapter first, or load the model again",
            )

    def give_back(self, frozen: FrozenModule, leaf: str = "weight") -> None:
        """Restore the weight, and the bias if it was changed."""
        self.check(frozen, leaf)
        device = frozen.weight_device
        frozen.hold({suffix: buffer.to(device) for suffix, buffer in self.buffers.items()}, leaf)
        frozen.frozen[leaf].version = self.version
        if self.bias is not None:
            cast("FrozenLinear", frozen).bias.data.copy_(self.bias)


class FrozenLoraLinear(LoraLinear):
    """A LoRA layer over a :class:`FrozenLinear`. PEFT's own layer would add floats to bytes when it merges.

    Merging decodes the weight, adds the update in float32 and encodes the sum with the same codec. The original bytes
    are kept until the layer is unloaded, so that unmerging restores them exactly.
    """

    _before_merge: BeforeMerge | None = None

    def get_base_layer(self) -> FrozenLinear:
        return cast("FrozenLinear", super().get_base_layer())

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        check_plain(adapter_name, config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge as PEFT does; the codec refuses NaN and Inf whatever the value of ``safe_merge``."""
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not adapters:
            return
        frozen = self.get_base_layer()
        before = BeforeMerge.of(frozen, kept=self._before_merge)
        merged = frozen.decode(torch.float32)
        for name in adapters:
            merged += self.get_delta_weight(name).to(merged)
        frozen.encode(merged)
        self._before_merge = before.merged(frozen)
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Restore the bytes from before the first merge, which undoes all merged adapters at once."""
        if self._before_merge is not None:
            self._before_merge.give_back(self.get_base_layer())
            self._before_merge = None
        self.merged_adapters.clear()


class FrozenLoraExperts(ParamWrapper):
    """A LoRA layer over one weight of :class:`FrozenExperts`, with a pair of matrices per expert.

    Names and shapes are those of PEFT's ``ParamWrapper``, which would add the update to the whole weight in every
    forward pass. The experts call this layer with the rows of each expert, and it computes only experts with rows.
    Merging proceeds expert by expert; see :class:`FrozenLoraLinear`.
    """

    _before_merge: BeforeMerge | None = None
    base_layer: FrozenExperts | FrozenLoraExperts

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        _check_dropout(adapter_name, config)
        super().__init__(base_layer, adapter_name, parameter_name, config, **kwargs)
        self.get_base_layer().updates[parameter_name] = self.update

    def get_base_layer(self) -> FrozenExperts:
        return cast("FrozenExperts", super().get_base_layer())

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        check_plain(adapter_name, config)
        _check_dropout(adapter_name, config)
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


VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "layer_replication",
)
"""Fields of a ``LoraConfig`` that make it more than one product per module, or share a weight between modules."""
_PLAIN_STARTS = (True, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base weight unchanged."""


def check_plain(adapter_name: str, config: LoraConfig) -> None:
    """Raise ConfigError unless the adapter computes the same over encoded weights as when it is merged into them."""
    found = next((name for name in VARIANTS if getattr(config, name, None)), None)
    if found is None and config.init_lora_weights and config.init_lora_weights not in _PLAIN_STARTS:
        found = f"init_lora_weights={config.init_lora_weights!r}"
    if found is not None:
        found = "DoRA" if found == "use_dora" else found
        raise ConfigError(
            f"adapter '{adapter_name}' uses {found} over encoded weights",
            expected="plain LoRA or rsLoRA",
            fix="train a plain adapter",
        )


def _check_dropout(adapter_name: str, config: LoraConfig) -> None:
    if config.lora_dropout:
        raise ConfigError(
            f"adapter '{adapter_name}' has dropout {config.lora_dropout} and adapts experts",
            expected="dropout 0",
            fix="leave it out",
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


def with_frozen_layer(config: LoraConfig) -> LoraConfig:
    """Make PEFT use the layers of this module over frozen base layers.

    This is not saved with the adapter: call this function on every load.
    """
    config._register_custom_module({FrozenLinear: FrozenLoraLinear, FrozenExperts: FrozenLoraExperts})
    return config


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


def _add_embeddings(model: PreTrainedModel, adapter: str | Path) -> bool:
    """Add embeddings for the tokens whose rows ``adapter`` holds, and return whether there were such tokens.

    Raises:
        CheckpointError: the adapter has no rows for other tokens that would get embeddings.
    """
    tokens, rows = read_adapter(adapter).trained_tokens, embedding_rows(model) or 0
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
    """Load the PEFT LoRA adapter in the directory ``adapter`` onto ``model``, ready to be merged whatever the codec.

    Raises:
        CheckpointError: the adapter does not match the model, or lacks a tensor (PEFT would only warn).
    """
    try:
        read_adapter(adapter)
        config = LoraConfig.from_pretrained(str(adapter))
        # The initialization, which may for example decompose the base weight, is not repeated.
        config.init_lora_weights = True
        # Strings are regular expressions, which PEFT would evaluate.
        if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
            config.target_modules, config.exclude_modules = adapted_modules(adapter), None
        grown = _add_embeddings(model, adapter)
        with only_modules(model, always=bool(config.target_parameters)):
            if local_parameters(model):
                adapted = _load_local(model, adapter, config, trainable=trainable)
            else:
                adapted = PeftModel.from_pretrained(
                    model, str(adapter), config=with_frozen_layer(config), is_trainable=trainable
                )
        with safe_open(Path(adapter) / WEIGHTS, "pt") as file:
            saved = set(file.keys())
    except ArcticError:
        raise
    except Exception as error:  # a damaged file can make PEFT raise anything
        text = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"{adapter} cannot be loaded onto its base model: {type(error).__name__}: {text}",
            fix="it is damaged or belongs to another model: train it again",
        ) from error
    if missing := get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - saved:
        raise CheckpointError(
            f"{adapter} lacks {len(missing)} tensors, for example {min(missing)}",
            fix="the adapter is incomplete: save it again",
        )
    return prepare_new_rows(adapted) if grown else adapted


def _load_local(model: PreTrainedModel, adapter: str | Path, config: LoraConfig, *, trainable: bool) -> PeftModel:
    """Load the adapter of all experts onto a model that holds only some of them."""
    config.inference_mode = not trainable
    adapted = get_peft_model(model, with_frozen_layer(config))
    state, layouts = load_file(Path(adapter) / WEIGHTS), expert_pairs(adapted)
    for name, (_, dispatch) in local_parameters(adapted).items():
        key = name.replace(f".{adapted.active_adapter}.weight", ".weight")
        if name in layouts and key in state:
            experts = layouts[name].split(state[key]).shape[0]
            state[key] = layouts[name].part(state[key], dispatch.local(experts))
    set_peft_model_state_dict(adapted, state)
    return adapted
