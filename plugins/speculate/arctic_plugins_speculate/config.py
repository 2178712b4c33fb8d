"""Options of the ``speculate`` plugin. The names are those of vLLM's ``SpeculativeConfig`` (0.32.0), shortened."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from arctic_plugins import THIS_MACHINE, PluginConfig

__all__ = ["SpeculateConfig"]

_OF_METHOD = {
    "model": "draft",
    "prompt_lookup_min": "ngram",
    "prompt_lookup_max": "ngram",
    "min_token_prob": "suffix",
    "max_spec_factor": "suffix",
    "max_tree_depth": "suffix",
    "max_cached_requests": "suffix",
}
"""Options of a single method."""


class SpeculateConfig(PluginConfig):
    """Options under ``speculate:`` in a recipe, or in ``arctic serve --plugins``."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}, {"method": "ngram"}]})

    method: Literal["suffix", "ngram", "draft"] = "suffix"
    """Where drafts come from: ``suffix``, the request's own text and past answers; ``ngram``, the request's own text;
    ``draft``, a smaller model with the same vocabulary.
    """
    tokens: Annotated[int, Field(ge=1, le=64)] | None = None
    """The most tokens to draft for a request in a step. Left out: 7 for ``suffix``, 3 for ``ngram`` and ``draft``."""
    model: Annotated[str | None, THIS_MACHINE] = None
    """draft: the draft model, a directory or Hub id."""
    prompt_lookup_min: Annotated[int, Field(ge=1, le=64)] | None = None
    """ngram: the shortest match, in tokens. Left out: ``prompt_lookup_max``, or 3."""
    prompt_lookup_max: Annotated[int, Field(ge=1, le=64)] | None = None
    """ngram: the longest match that is distinguished, in tokens. Left out: ``prompt_lookup_min``, or 5."""
    min_token_prob: Annotated[float, Field(ge=0, le=1)] = 0.15
    """suffix: drafts end before a token whose estimated probability of being accepted is below this."""
    max_spec_factor: Annotated[float, Field(gt=0, le=1024)] = 4.0
    """suffix: the most tokens to draft for each token of the match."""
    max_tree_depth: Annotated[int, Field(ge=2, le=1024)] = 64
    """suffix: the longest match, in tokens."""
    max_cached_requests: Annotated[int, Field(ge=0, le=1_000_000)] = 10_000
    """suffix: the number of past answers to remember, of which only the last 262144 tokens are kept. 0: none."""

    @model_validator(mode="after")
    def _check_method(self) -> SpeculateConfig:
        for name, method in _OF_METHOD.items():
            # A checkpoint has every option spelled out, so the defaults of another method are fine.
            if self.method != method and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"method '{method}' with {name}")
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        if low is not None and high is not None and low > high:
            raise ValueError("a prompt_lookup_min of at most prompt_lookup_max")
        return self
