"""The config fields that hosts read, computed from the options, and the frequencies of ``ntk``.

This module does not depend on a host; only the names of the fields are transformers'.

There are two families of types, in which ``max_position_embeddings`` has different meanings (transformers 5.19.0,
``modeling_rope_utils.py``; vLLM 0.32, ``config/model.py`` ``_get_and_verify_max_len``):

- ``yarn``, ``llama3``, ``longrope``: the length to reach; the parameters contain ``original_max_position_embeddings``.
- all others: the length used in training, which ``factor`` multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arctic_plugins import ROPE_MARK
from arctic_plugins.errors import ConfigError, suggest
from arctic_plugins_rope.config import RoPEConfig

__all__ = ["EXTENDED", "TYPES", "configure", "ntk"]

TYPES: dict[str, frozenset[str]] = {
    "linear": frozenset(),
    "dynamic": frozenset(),
    "ntk": frozenset({"mixed_b"}),
    "yarn": frozenset({"attention_factor", "beta_fast", "beta_slow", "truncate"}),
    "llama3": frozenset({"low_freq_factor", "high_freq_factor"}),
    "longrope": frozenset({"attention_factor", "long_factor", "short_factor"}),
}
"""Type -> its options that not all types have."""
EXTENDED = frozenset({"yarn", "llama3", "longrope"})
"""Types for which ``max_position_embeddings`` is the length to reach."""
_SPECIAL = frozenset().union(*TYPES.values())


def ntk(parameters: Mapping[str, Any], dim: int) -> tuple[Tensor, float]:
    """Compute NTK-aware scaling, fixed or mixed, as vLLM 0.32 defines it (``rotary_embedding/ntk_scaling_rope.py``).

    transformers does not have it. Fixed scaling divides frequency i by ``factor ** ((2i + 2) / dim)``: the lowest by
    ``factor``, the highest by almost 1. Mixed scaling, with ``mixed_b``, divides by ``exp(a * (i + 1) ** b)``, where
    ``a`` is chosen such that the lowest is divided by ``factor``. Su, "NTK-RoPE" (kexue.fm/archives/9706), 2023, after
    bloc97.

    Args:
        parameters: ``rope_theta``, ``factor`` and optionally ``mixed_b``.
        dim: number of dimensions of a head that are rotated.

    Returns:
        Inverse frequencies ``[dim / 2]`` in float32, and the attention factor 1.
    """
    factor, mixed_b = parameters["factor"], parameters.get("mixed_b")
    number = torch.arange(1, dim // 2 + 1, dtype=torch.float32)
    plain = 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if mixed_b is None:
        return plain / factor ** (2 * number / dim), 1.0
    return plain / (math.log(factor) / (dim / 2) ** mixed_b * number**mixed_b).exp(), 1.0


def configure(options: RoPEConfig, config: Any, registered: Sequence[str] = ()) -> None:
    """Write the scaling specified by ``options`` to ``config``, a transformers ``PreTrainedConfig``.

    Args:
        options: those of the recipe.
        config: its ``rope_parameters`` and ``max_position_embeddings`` are changed in place.
        registered: types that installed plugins register.

    Raises:
        ConfigError: the options contradict each other or the model, or the hosts would silently differ.
    """
    known = {**TYPES, **{name: frozenset({"parameters"}) for name in registered if name not in TYPES}}
    if options.type not in known:
        raise ConfigError(
            f"plugins.rope.type is '{options.type}'",
            expected=f"one of {', '.join(sorted(known))}",
            fix=suggest(options.type, known),
        )
    for name in sorted(_SPECIAL | {"parameters"}):
        if getattr(options, name) not in (None, {}) and name not in known[options.type]:
            owners = (
                " and ".join(kind for kind, own in known.items() if name in own) or "types that other plugins register"
            )
            raise ConfigError(
                f"plugins.rope.{name} is set, but type '{options.type}' does not use it",
                expected=f"type {owners}",
                fix="leave it out",
            )
    current = getattr(config, "rope_parameters", None)
    if not current:
        raise ConfigError(
            f"plugins.rope: {config.model_type} has no rotary position embeddings", fix="leave 'rope' out"
        )
    layers = _layers(options, config, current)
    original, factor, length = _lengths(
        options, config, [current if layer is None else current[layer] for layer in layers]
    )
    for layer in layers:
        parameters = _parameters(
            options, current if layer is None else current[layer], original, factor, _rotated(config, current, layer)
        )
        if layer is None:
            config.rope_parameters = parameters
        else:
            config.rope_parameters = {**config.rope_parameters, layer: parameters}
    extended = options.type in EXTENDED or "gemma3" in config.model_type  # vLLM expects this of Gemma 3 for every type
    config.max_position_embeddings = length if extended else original
    setattr(config, ROPE_MARK, True)


def _layers(options: RoPEConfig, config: Any, current: Mapping[str, Any]) -> list[str | None]:
    """Return the keys of ``current`` to change, or [None] if it is not nested by layer types."""
    nested = [key for key in current if isinstance(current[key], Mapping)]
    if not nested:
        if options.layer_types is not None:
            raise ConfigError(
                f"plugins.rope.layer_types is set, but all layers of {config.model_type} have the same RoPE",
                fix="leave it out",
            )
        return [None]
    if options.type == "dynamic":
        raise ConfigError(
            f"plugins.rope.type is 'dynamic', but the layers of {config.model_type} differ",
            expected="another type, because the hosts would disagree",
            fix="use 'ntk', for example",
        )
    if options.truncate is False:
        raise ConfigError(
            f"plugins.rope.truncate is false, but the layers of {config.model_type} differ",
            expected="true, because transformers would ignore the option",
            fix="leave it out",
        )
    layers = options.layer_types or [name for name in nested if "sliding" not in name and "chunked" not in name]
    for name in layers:
        if name not in nested:
            raise ConfigError(
                f"plugins.rope.layer_types names '{name}'",
                expected=f"some of {', '.join(nested)}",
                fix=suggest(name, nested),
            )
    return list(layers)


def _lengths(options: RoPEConfig, config: Any, current: Sequence[Mapping[str, Any]]) -> tuple[int, float, int]:
    """Return (length used in training, factor, length to reach)."""
    scaled = next(
        (found for found in current if found.get("rope_type", "default") not in ("default", "proportional")), None
    )
    original = options.original_max_position_embeddings
    if original is None and scaled is not None:
        if scaled["rope_type"] != options.type:
            raise ConfigError(
                f"plugins.rope: the model is already scaled ({scaled['rope_type']}, max_position_embeddings "
                f"{config.max_position_embeddings})",
                expected="a model without scaling, or the original length",
                fix="set plugins.rope.original_max_position_embeddings to the length that scaling starts from",
            )
        original = scaled.get("original_max_position_embeddings")
    original = original or config.max_position_embeddings
    if options.max_position_embeddings is None and options.factor is None:
        raise ConfigError(
            "plugins.rope has neither max_position_embeddings nor factor",
            expected="one of them",
            fix="set max_position_embeddings to the length to reach",
        )
    length = options.max_position_embeddings or int(original * options.factor)  # type: ignore[operator]
    factor = options.factor or length / original
    if length <= original:
        raise ConfigError(
            f"plugins.rope.max_position_embeddings is {length}, but the model was trained with {original}",
            expected="a larger value",
            fix="raise it, or leave 'rope' out",
        )
    reached = int(original * factor)
    if (options.type == "yarn" and reached < length) or (
        options.type not in ("yarn", "llama3", "longrope") and reached != length
    ):
        raise ConfigError(
            f"plugins.rope.factor {factor:g} times {original} is {reached}, but max_position_embeddings is {length}",
            expected="the same" if options.type != "yarn" else "at most the product: vLLM has no more positions",
            fix="leave one of the two out",
        )
    return original, factor, length


def _rotated(config: Any, current: Mapping[str, Any], layer: str | None) -> int:
    """Return the number of dimensions of a head that are rotated."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head * (current if layer is None else current[layer]).get("partial_rotary_factor", 1.0))


def _parameters(
    options: RoPEConfig, current: Mapping[str, Any], original: int, factor: float, dim: int
) -> dict[str, Any]:
    kept = {name: current[name] for name in ("rope_theta", "partial_rotary_factor") if current.get(name) is not None}
    if options.rope_theta is not None:
        kept["rope_theta"] = options.rope_theta
    parameters: dict[str, Any] = {**kept, "rope_type": options.type, "factor": float(factor)}
    if options.type in EXTENDED:
        parameters["original_max_position_embeddings"] = original
    if options.type == "yarn":
        parameters["beta_fast"], parameters["beta_slow"] = options.beta_fast or 32.0, options.beta_slow or 1.0
        if parameters["beta_fast"] <= parameters["beta_slow"]:
            raise ConfigError(
                f"plugins.rope.beta_fast is {parameters['beta_fast']:g} and beta_slow {parameters['beta_slow']:g}",
                expected="beta_fast > beta_slow",
                fix="correct them",
            )
        parameters["attention_factor"] = (
            options.attention_factor or 0.1 * math.log(factor) + 1.0
        )  # Peng et al., 2023, equation 22
        if options.truncate is not None:
            parameters["truncate"] = options.truncate
    elif options.type == "llama3":
        parameters["low_freq_factor"], parameters["high_freq_factor"] = (
            options.low_freq_factor or 1.0,
            options.high_freq_factor or 4.0,
        )
        if parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
            found = f"{parameters['high_freq_factor']:g} and low_freq_factor {parameters['low_freq_factor']:g}"
            raise ConfigError(
                f"plugins.rope.high_freq_factor is {found}",
                expected="high_freq_factor > low_freq_factor",
                fix="correct them",
            )
    elif options.type == "longrope":
        if options.long_factor is None:
            expected = f"{dim // 2} divisors, found by a search (Ding et al., LongRoPE, 2024)"
            raise ConfigError("plugins.rope.long_factor is missing", expected=expected, fix="add it, or use type yarn")
        for name, values in (
            ("long_factor", options.long_factor),
            ("short_factor", options.short_factor or (1.0,) * (dim // 2)),
        ):
            if len(values) != dim // 2:
                raise ConfigError(
                    f"plugins.rope.{name} has {len(values)} numbers",
                    expected=f"{dim // 2}, one per frequency",
                    fix="correct it",
                )
            parameters[name] = list(values)
        if options.attention_factor is not None:  # vLLM's names; without them it computes the default
            parameters["short_mscale"] = parameters["long_mscale"] = options.attention_factor
        parameters["attention_factor"] = options.attention_factor or math.sqrt(
            1 + math.log(factor) / math.log(original)
        )  # Ding et al., 2024
    elif options.type == "ntk" and options.mixed_b is not None:
        parameters["mixed_b"] = options.mixed_b
    elif options.type not in TYPES:
        parameters |= {"original_max_position_embeddings": original, **options.parameters}
    return parameters
