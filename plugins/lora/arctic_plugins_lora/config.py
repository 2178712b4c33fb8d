"""Options of the ``lora`` plugin: the fields of PEFT's ``LoraConfig``, under the same names. Read in peft 0.21.2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from arctic_plugins import PluginConfig
from arctic_plugins.adapter import NAME

__all__ = ["CALLED", "REFUSED", "LoraOptions"]

CALLED: Mapping[str, str] = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
"""Fields of ``LoraConfig`` that have another name here."""

_BY_PEFT = "PEFT sets it"
_IN_A_SCRIPT = "write a script for it: load_model, then PEFT's own functions"

REFUSED: Mapping[str, str] = {
    "task_type": "it follows from the model",
    "peft_type": _BY_PEFT,
    "auto_mapping": _BY_PEFT,
    "peft_version": _BY_PEFT,
    "base_model_name_or_path": "it is the recipe's model",
    "revision": "it is the one in load: {revision: ...}",
    "inference_mode": "it is for adapters that are not trained",
    "fan_in_fan_out": "PEFT sets it for the modules that need it",
    "megatron_config": "models of Megatron are not supported",
    "megatron_core": "models of Megatron are not supported",
    "loftq_config": f"LoftQ changes the base weights: the adapter would not fit the base model; {_IN_A_SCRIPT}",
    "eva_config": f"EVA reads data before training; {_IN_A_SCRIPT}",
    "corda_config": f"CorDA reads data before training and changes the base weights; {_IN_A_SCRIPT}",
    "lora_ga_config": f"LoRA-GA needs gradients of the base weights before training; {_IN_A_SCRIPT}",
    "alora_invocation_tokens": "PEFT looks for these tokens once in a row of data, which may contain several texts",
    "use_qalora": "PEFT implements QA-LoRA for GPTQ only",
    "qalora_group_size": "PEFT implements QA-LoRA for GPTQ only",
    "monteclora_config": f"MonteCLoRA needs a loss of its own, which the Trainer does not add; {_IN_A_SCRIPT}",
    "kasa_config": f"KaSA needs a loss of its own, which the Trainer does not add; {_IN_A_SCRIPT}",
    "arrow_config": f"Arrow combines adapters that are already trained; {_IN_A_SCRIPT}",
    "layer_replication": "the adapter would need a larger model than its base model, and no host loads such an adapter",
    "runtime_config": "it is not part of an adapter",
}
"""Fields of ``LoraConfig`` that are not options, and why."""

_STARTS = (True, False, "gaussian", "orthogonal", "mica")
_OTHER_STARTS = {
    "eva": REFUSED["eva_config"],
    "corda": REFUSED["corda_config"],
    "lora_ga": REFUSED["lora_ga_config"],
    "loftq": REFUSED["loftq_config"],
    "olora": f"OLoRA changes the base weights, so the adapter would not fit the base model; {_IN_A_SCRIPT}",
    "pissa": f"PiSSA changes the base weights, so the adapter would not fit the base model; {_IN_A_SCRIPT}",
}


def _start(value: bool | str) -> bool | str:
    if value not in _STARTS:
        why = _OTHER_STARTS.get(str(value).partition("_niter_")[0])
        raise ValueError("true, false, 'gaussian', 'orthogonal' or 'mica'" + (f": {why}" if why else ""))
    return value


def _name(value: str) -> str:
    if not re.fullmatch(NAME, value):
        raise ValueError("a name or the end of one, such as q_proj; an adapter's file contains no regular expressions")
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | int) else value


Name = Annotated[str, AfterValidator(_name)]
Names = Annotated[tuple[Name, ...], Field(min_length=1)]
Ids = tuple[NonNegativeInt, ...]


class VeloraOptions(PluginConfig):
    """PEFT's ``VeloraConfig``."""

    num_groups: PositiveInt = 64
    """Groups into which the features of an activation are split before it is compressed."""
    scale: PositiveFloat = 1.0
    """Scale of the activations that backward reconstructs."""
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"
    """How the projection is chosen."""


class BdLoraOptions(PluginConfig):
    """PEFT's ``BdLoraConfig``."""

    target_modules_bd_a: Names | None = None
    """Modules whose matrix A is block-diagonal."""
    target_modules_bd_b: Names | None = None
    """Modules whose matrix B is block-diagonal."""
    nblocks: PositiveInt = 1
    """Blocks per matrix."""
    match_strict: bool = True
    """Whether every targeted module has to be in one of the two lists."""


class LoraOptions(PluginConfig):
    """Options under ``lora:`` in a recipe; the names are PEFT's."""

    r: PositiveInt = 16
    """Rank of the update."""
    alpha: PositiveFloat = 16
    """The update is scaled by alpha / r (Hu et al., "LoRA", 2021), or alpha / sqrt(r) with ``use_rslora``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of the update's input in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules that get an update, as in PEFT. ``all-linear`` is every linear module except the output head; the experts
    of a mixture are not included.
    """
    exclude_modules: str | tuple[str, ...] | None = None
    """Modules that get none although ``target_modules`` matches them."""
    layers_to_transform: Annotated[
        Ids | None, BeforeValidator(_listed, json_schema_input_type=Ids | NonNegativeInt | None)
    ] = None
    """Numbers of the layers that are adapted; needs ``target_modules`` as a list."""
    layers_pattern: Annotated[Names | None, BeforeValidator(_listed, json_schema_input_type=Names | Name | None)] = None
    """Name of the list of layers, where it is not a usual one."""
    experts: bool = False
    """Also adapt the experts of a mixture, with a pair of matrices for each expert: all ``target_parameters``."""
    target_parameters: Names | None = None
    """Weights of experts to adapt, for example ``mlp.experts.down_proj``."""
    rank_pattern: dict[Name, PositiveInt] = {}
    """Other ranks for some modules, by the end of their name."""
    alpha_pattern: dict[Name, PositiveFloat] = {}
    """Other values of alpha for some modules, by the end of their name."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base model to train: all, or those of the adapted modules."""
    init_lora_weights: Annotated[bool | str, AfterValidator(_start)] = True
    """How the update starts: at zero (``true``, ``gaussian``, ``orthogonal``, ``mica``) or at random (``false``)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski, "rsLoRA", 2023)."""
    use_dora: bool = False
    """Train the norm of each row of the weight separately (Liu et al., "DoRA", 2024). Encoded weights are decoded in
    every forward pass."""
    lora_bias: bool = False
    """Also train a bias of the update. It is merged into the module's bias."""
    modules_to_save: Names | None = None
    """Modules that are trained as a whole, for example ``lm_head`` and ``embed_tokens``, and saved with the adapter."""
    trainable_token_indices: Ids | dict[Name, Ids] | None = None
    """Ids of tokens whose embeddings are trained; a mapping from embedding modules to ids if there are several."""
    ensure_weight_tying: bool = False
    """Keep tied weights tied if one of them is trained."""
    velora_config: VeloraOptions | None = None
    """Save compressed activations for backward (Miles et al., "VeLoRA", 2024)."""
    use_bdlora: BdLoraOptions | None = None
    """Make matrices block-diagonal ("BD-LoRA", 2025)."""

    @model_validator(mode="after")
    def _check_experts(self) -> LoraOptions:
        if not self.experts and self.target_parameters is None:
            return self
        if self.experts and self.target_parameters is not None:
            raise ValueError("experts or target_parameters, not both")
        others = ("dropout", "use_dora", "lora_bias", "velora_config", "use_bdlora")
        found = next((name for name in others if getattr(self, name)), None)
        if self.init_lora_weights not in (True, False, "gaussian"):
            found = "init_lora_weights"
        if found:
            raise ValueError(
                f"{found} {getattr(self, found)!r} with experts: PEFT does not support {found} for experts; leave one "
                "of the two out"
            )
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> LoraOptions:
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("target_modules as a list of names with layers_to_transform, for example [q_proj, v_proj]")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_to_transform with layers_pattern")
        return self
