"""How a server with one API process ends: requests in flight finish, new ones are refused, and no client holds it up.

Read in vllm 0.32.0 (``entrypoints/launchers/launcher.py``). The state is global, because vLLM imports the middleware by
its name.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from arctic_plugins.patches import patch

__all__ = ["ENDING", "ENGINE_DIED", "Ending", "RefuseWhenStopping", "end_now", "tell_death"]

ENGINE_DIED = 70
"""Exit status if the engine died: EX_SOFTWARE of ``sysexits.h``.

vLLM's own server exits with 0 in this case, and a supervisor does not restart it.
"""
GRACE = 5.0
"""Seconds in which connections are closed once the engine has stopped. Then the process exits, whoever is connected."""
WATCHDOG = 10.0
"""Seconds in which vLLM notices that its engine died (every 5 s, ``watchdog_loop``) and begins to stop the server."""


class Ending:
    """Whether the engine of this process was asked to stop by a signal, or died."""

    def __init__(self) -> None:
        self.asked = self.died = False
        self.stopped, self.over = threading.Event(), threading.Event()

    @asynccontextmanager
    async def watched(self, build: Callable[..., Any], *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        """Build vLLM's engine client as ``build`` does, and note how it ends.

        A signal ends the process at once until ``serve_http`` handles signals. vLLM's own handler raises an exception,
        which is lost while the engine starts.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: end_now(128 + number))
        async with build(*arguments, **keywords) as engine:
            why = "vLLM's server does not tell whether its engine died or was stopped, and ignores a second signal"

            @patch(engine, "shutdown", why=why, read_in="vllm 0.32.0")
            def asked_to(shutdown: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
                self.asked = True  # by a signal, see ``serve_http``; afterwards the engine looks as if it had died
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self.end_at_next_signal, loop)
                try:
                    return shutdown(*arguments, **keywords)
                finally:
                    self.stopped.set()

            threading.Thread(target=self.watch, args=(engine,), daemon=True, name="arctic-watchdog").start()
            try:
                yield engine
            finally:
                self.died = engine.errored and not self.asked

    def watch(self, engine: Any) -> None:
        """End the process if it is still there some time after its engine ended, for example for a stuck client."""
        while not (self.stopped.wait(1) or (engine.errored and not self.asked)):
            pass
        died = self.died or not self.asked
        if not self.over.wait(WATCHDOG + GRACE if died else GRACE):
            end_now(ENGINE_DIED if died else 0)

    def end_at_next_signal(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make a second signal end the process at once, with the status of a process that it killed."""
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end_now, 128 + number)


ENDING = Ending()


class RefuseWhenStopping:
    """ASGI middleware that answers requests with status 503 once the server was asked to stop, ``/health`` included.

    The engine would not answer them at all. Requests that have begun are not affected.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not ENDING.asked or scope["type"] != "http" or scope["path"].rstrip("/") == "/metrics":
            await self.app(scope, receive, send)
            return
        error = {
            "message": "the server is shutting down",
            "type": "ServiceUnavailableError",
            "param": None,
            "code": 503,
        }
        headers = [(b"content-type", b"application/json"), (b"connection", b"close"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


def tell_death() -> None:
    """Print the last line of a server whose engine died."""
    print("arctic: vLLM's engine died; its error is above", file=sys.stderr)


def end_now(status: int) -> None:
    """End this process and those that it started, without waiting for anything."""
    import psutil

    if status == ENGINE_DIED:
        tell_death()
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    os._exit(status)
