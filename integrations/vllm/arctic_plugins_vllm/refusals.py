"""Requests that vLLM's server should refuse as bad ones, but answers with status 500. Read in vllm 0.32.0.

JSON has strings and numbers that vLLM checks in some fields only, and that MessagePack, in which requests are sent to
the engine, does not have: half of a surrogate pair (``"stop": "\\ud800"``), and integers of more than 64 bits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from arctic_plugins.patches import patch_when_imported

__all__ = ["install"]

MODULE, READ_IN = "vllm.v1.engine.async_llm", "vllm 0.32.0"
UNSENDABLE = (OverflowError, TypeError, ValueError)
"""What the encoder and tokenizers raise for such values. vLLM's own refusals (``VLLMError``) are none of them."""


def install() -> None:
    """Replace two methods of the engine's client once it is imported. Idempotent."""
    why = "vLLM's server answers a request that cannot be sent to the engine with status 500"
    patch_when_imported(MODULE, "AsyncLLM", "add_request", why=why, read_in=READ_IN)(refuse)
    why = "vLLM's server never forgets a request that could not be sent to the engine"
    patch_when_imported(MODULE, "AsyncLLM", "_add_request", why=why, read_in=READ_IN)(forget)


async def refuse(add: Callable[..., Awaitable[Any]], engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Add a request to ``engine``.

    Raises:
        VLLMValidationError: it has a value that cannot be sent; the server answers with status 400 and this message.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        return await add(engine, *args, **kwargs)
    except UNSENDABLE as error:
        raise VLLMValidationError(f"The request has a value that cannot be sent to the engine: {error}") from error


async def forget(add: Callable[..., Awaitable[None]], engine: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """Register a request in this process and send it, or do neither."""
    try:
        await add(engine, request, *args, **kwargs)
    except UNSENDABLE:
        # Not `engine.abort`: it would send the request's id, which may be the very value.
        engine.output_processor.abort_requests([request.request_id], internal=True)
        raise
