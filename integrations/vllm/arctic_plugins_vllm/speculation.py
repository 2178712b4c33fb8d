"""Mends sampling with speculative decoding on CPU, for every method. Read in vllm 0.32.0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arctic_plugins.patches import patch_when_imported

__all__ = ["compare_drafts", "expand_batch_to_tokens", "install"]

MODULE, READ_IN = "vllm.v1.sample.rejection_sampler", "vllm 0.32.0"


def install() -> None:
    """Replace two functions of vLLM's rejection sampler once it is imported. Idempotent."""
    why = "on CPU vLLM drops per-request values such as the temperature, and uses memory that was never written"
    patch_when_imported(MODULE, None, "expand_batch_to_tokens", why=why, read_in=READ_IN)(expand_batch_to_tokens)
    why = "in steps without a draft vLLM compares drafts nevertheless, and an engine on CPU dies if top_k is set"
    patch_when_imported(MODULE, "RejectionSampler", "forward", why=why, read_in=READ_IN)(compare_drafts)


def expand_batch_to_tokens(
    expand: Callable[..., Any], x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Any:
    """Repeat ``x`` ``[R]`` for each request's drafted tokens, of which ``cu_num_tokens`` ``[R]`` is the running total.

    On CPU vLLM's own function, ``expand``, writes to a copy that it drops, unless ``x`` is int64
    (``_expand_kernel_impl`` in ``utils/cpu_triton_utils.py``). Logits are then divided by whatever is in memory: tokens
    are sampled from another distribution, and an engine with ``top_k`` dies.
    """
    if x.device.type != "cpu":
        return expand(x, cu_num_tokens, num_tokens, replace_from, replace_to)
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)


def compare_drafts(
    compare: Callable[..., Any], sampler: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any
) -> Any:
    """Sample as without speculation in a step in which no request has a draft, such as after a prompt.

    vLLM's own method, ``compare``, would take more time for the same, and on CPU the maximum of no ``top_k``
    (``apply_top_k_only``), an error that ends the engine.
    """
    if metadata.max_spec_len == 0:  # then `logits` has one row for each request
        return sampler.sampler(logits=logits, sampling_metadata=sampling_metadata)
    return compare(sampler, metadata, draft_probs, logits, sampling_metadata)
