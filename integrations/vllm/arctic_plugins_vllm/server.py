"""vLLM's OpenAI server with option values as JSON: ``python -m arctic_plugins_vllm.server JSON [OPTION...]``.

Read in vllm 0.32.0. ``JSON`` is an object of option -> value, which applies to options that the command line does not
set. Some values come from a checkpoint's files, so they must never be parsed as a command line. vLLM's ``--config
FILE`` would do that (``FlexibleArgumentParser._pull_args_from_config``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

__all__ = ["ENGINE_DIED", "parse"]

ENGINE_DIED = 70
"""Exit status if the engine died: EX_SOFTWARE of ``sysexits.h``.

vLLM's own server exits with 0 in this case, and a supervisor does not restart it.
"""
DRAIN = 20
"""Default of ``--shutdown-timeout``: seconds in which requests may finish once the server is asked to stop.

vLLM's own, 0, aborts them. Kubernetes kills a process after 30 s.
"""
GRACE = 5.0
"""Seconds in which connections are closed once the engine has stopped. Then the process exits, whoever is connected."""
WATCHDOG = 10.0
"""Seconds in which vLLM notices that its engine died (every 5 s, ``watchdog_loop``) and begins to stop the server."""


def parse(values: Mapping[str, Any], options: Sequence[str]) -> argparse.Namespace:
    """Return the options of vLLM's server.

    ``options``, parsed as its command line, take precedence over ``values``, and these over its defaults.

    Raises:
        ConfigError: a value is for an option that this version of vLLM does not have.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from arctic_plugins.errors import ConfigError, suggest

    parser = make_arg_parser(FlexibleArgumentParser(prog="arctic serve"))
    known = {action.dest for action in parser._actions}
    if unknown := sorted(values.keys() - known):
        raise ConfigError(
            f"a plugin sets vLLM's option '{unknown[0]}', which this version does not have",
            fix=suggest(unknown[0], known),
        )
    modules = [LoRAModulePath(**module) for module in values.get("lora_modules", ())]
    parser.set_defaults(**{"shutdown_timeout": DRAIN, **values, "lora_modules": modules or None})
    return parser.parse_args(list(options))


class _Ending:
    """How the engine of a server in this process ends: asked to by a signal, or not."""

    def __init__(self) -> None:
        self.asked = self.died = False
        self.stopped, self.over = threading.Event(), threading.Event()

    @asynccontextmanager
    async def watched(self, build: Callable[..., Any], *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        """Build vLLM's engine client as ``build`` does, and note how it ends."""
        from arctic_plugins.patches import patch

        loop = asyncio.get_running_loop()
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
        while not (self.stopped.wait(1) or engine.errored):
            pass
        died = not self.asked
        if not self.over.wait(WATCHDOG + GRACE if died else GRACE):
            end_now(ENGINE_DIED if died else 0)

    def end_at_next_signal(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end_now, 128 + number)


def end_now(status: int) -> None:
    """End this process and those that it started, without waiting for anything."""
    import psutil

    if status == ENGINE_DIED:
        print("arctic: vLLM's engine died; its error is above", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    os._exit(status)


def _serve(args: argparse.Namespace) -> bool:
    """Serve until a signal arrives or the engine dies. Return whether it died."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.api_server import entry

    from arctic_plugins.patches import patch

    ending = _Ending()
    why = "tells whether the engine died or was stopped: both end the server with status 0"
    patch(entry, "build_async_engine_client", why=why, read_in="vllm 0.32.0")(ending.watched)
    try:
        ServeSubcommand.cmd(args)  # with several API servers or nodes, or data parallelism, as 'vllm serve' does
    finally:
        ending.over.set()
    # A node without a server waits for its workers: it returns if one of them ends, and exits if a signal arrives.
    return ending.died or args.headless


def main() -> None:
    """Run the server like vLLM's ``entry.main``."""
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    from arctic_plugins.errors import ArcticError

    cli_env_setup()
    try:
        args = parse(json.loads(sys.argv[1]), sys.argv[2:])
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
        died = _serve(args)
    except ArcticError as error:
        print(f"arctic: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:  # a signal before the server was ready
        print("arctic: stopped while starting", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    if died:
        print("arctic: vLLM's engine died; its error is above", file=sys.stderr)
        sys.exit(ENGINE_DIED)


if __name__ == "__main__":
    main()
