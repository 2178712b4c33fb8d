"""Questions to a server that runs for the duration of a ``with`` block."""

from __future__ import annotations

import json
import urllib.request

from arctic_plugins_huggingface.generate import chat
from arctic_plugins_vllm.running import Server as RunningServer

__all__ = ["Server"]


class Server(RunningServer):
    """An ``arctic serve`` process that can be asked."""

    def chat(
        self, question: str, *, max_tokens: int, system: str | None = None, model: str | None = None
    ) -> tuple[str, list[int]]:
        """Ask a question with greedy decoding, and return the answer's text and token ids."""
        body = {
            "model": model or self.arguments[0],
            "messages": chat(question, system),
            "temperature": 0,
            "max_tokens": max_tokens,
            "return_token_ids": True,
        }
        request = urllib.request.Request(  # noqa: S310 - the URL is that of a server on this machine
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as response:  # noqa: S310
            choice = json.load(response)["choices"][0]
        return choice["message"]["content"], choice["token_ids"]
