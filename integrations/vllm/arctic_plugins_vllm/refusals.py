"""Requests that vLLM's server is to refuse as bad ones, and answers with status 500 instead. Read in vllm 0.32.0.

JSON has strings and numbers that vLLM checks in some fields only, and that MessagePack, in which requests are sent to
the engine, does not have: half of a surrogate pair (``"stop": "\\ud800"``), and integers of more than 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["install"]

UNSENDABLE = (OverflowError, TypeError, ValueError)
"""What the encoder and tokenizers raise for such values. VLLMError, of requests that vLLM refuses, is none of them."""


def install() -> None:
    """Patch the client of vLLM's engine in this process, a server's."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    from arctic_plugins.patches import patch

    why = "a request that cannot be sent to the engine is answered with status 500 and remembered forever"

    @patch(AsyncLLM, "add_request", why=why, read_in="vllm 0.32.0")
    async def add_request(original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await original(engine, *args, **kwargs)
        except UNSENDABLE as error:
            raise VLLMValidationError(f"The request has a value that cannot be sent to the engine: {error}") from error

    @patch(AsyncLLM, "_add_request", why=why, read_in="vllm 0.32.0")
    async def register_and_send(
        original: Callable[..., Any], engine: Any, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            return await original(engine, request, *args, **kwargs)
        except UNSENDABLE:
            # Not `engine.abort`, which would send the id, maybe the very value.
            engine.output_processor.abort_requests([request.request_id], internal=True)
            raise
