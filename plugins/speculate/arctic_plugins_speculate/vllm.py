"""Suffix decoding in vLLM: a proposer for its method ``custom_class``. Read in vllm 0.32.0.

``v1/spec_decode/custom_class_proposer.py`` imports and builds it in each worker, before weights are loaded, and
``GPUModelRunner.propose_draft_token_ids`` calls it after every step. vLLM's own method ``suffix`` imports a package
that is a source distribution for old versions of vLLM; its options in ``SpeculativeConfig`` are used here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arctic_plugins.errors import ConfigError
from arctic_plugins_speculate.suffix import SuffixDrafter

__all__ = ["SuffixProposer"]


class SuffixProposer:
    """What vLLM calls for drafts.

    Raises:
        ConfigError: the model does not generate text.
    """

    def __init__(self, vllm_config: Any) -> None:
        model, options = vllm_config.model_config, vllm_config.speculative_config
        if model.runner_type != "generate":
            raise ConfigError(
                f"'speculate' is for models that generate text, and {model.model} is a {model.runner_type} model",
                fix="leave 'speculate' out",
            )
        new = partial(
            SuffixDrafter,
            tokens=options.num_speculative_tokens,
            min_token_prob=options.suffix_decoding_min_token_prob,
            max_spec_factor=options.suffix_decoding_max_spec_factor,
            max_tree_depth=options.suffix_decoding_max_tree_depth,
            max_cached_requests=options.suffix_decoding_max_cached_requests,
            ends=_ends(model),
            max_length=model.max_model_len,
        )
        self._drafter = new()
        compiled = new()  # so that the first steps do not wait for it
        for _ in range(3):
            compiled.propose([[0]], np.array([4]), np.zeros((1, 8), dtype=np.int32))

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Return a draft for each row of the batch; see :meth:`SuffixDrafter.propose`."""
        return self._drafter.propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there is no model."""


def _ends(model: Any) -> set[int]:
    """Return the ids of the tokens that end an answer, by the model's config and its ``generation_config.json``."""
    found: set[int] = set()
    for value in (
        getattr(model.hf_text_config, "eos_token_id", None),
        model.try_get_generation_config().get("eos_token_id"),
    ):
        found.update(value if isinstance(value, list) else () if value is None else (value,))
    return found
