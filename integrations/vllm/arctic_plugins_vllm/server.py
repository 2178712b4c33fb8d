"""vLLM's OpenAI server with option values as JSON: ``python -m arctic_plugins_vllm.server JSON [OPTION...]``.

Read in vllm 0.32.0. ``JSON`` is an object of option -> value, which applies to options that the command line does not
set. Some values come from a checkpoint's files, so they must never be parsed as a command line. vLLM's ``--config
FILE`` would do that (``FlexibleArgumentParser._pull_args_from_config``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

__all__ = ["ENGINE_DIED", "parse"]

ENGINE_DIED = 70
"""Exit status if the engine died: EX_SOFTWARE of ``sysexits.h``.

vLLM's own server exits with 0 in this case, and a supervisor does not restart it.
"""


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
    parser.set_defaults(**{**values, "lora_modules": modules or None})
    return parser.parse_args(list(options))


def _serve(args: argparse.Namespace) -> bool:
    """Serve until a signal arrives or the engine dies. Return whether it died."""
    import uvloop
    from vllm.entrypoints.launchers.api_server import entry

    from arctic_plugins.patches import patch

    asked, died = False, False
    read_in, why = "vllm 0.32.0", "tells whether the engine died or was stopped: both end the server with status 0"

    @patch(entry, "build_async_engine_client", why=why, read_in=read_in)
    @asynccontextmanager
    async def watched(build: Callable[..., Any], *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        async with build(*arguments, **keywords) as engine:

            @patch(engine, "shutdown", why=why, read_in=read_in)
            def asked_to(shutdown: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
                nonlocal asked
                asked = True  # by a signal, see ``serve_http``; afterwards the engine looks as if it had died
                return shutdown(*arguments, **keywords)

            try:
                yield engine
            finally:
                nonlocal died
                died = engine.errored and not asked

    uvloop.run(entry.run_server(args))
    return died


def main() -> None:
    """Run the server like vLLM's ``entry.main``."""
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    from arctic_plugins.errors import ArcticError

    cli_env_setup()
    try:
        args = parse(json.loads(sys.argv[1]), sys.argv[2:])
    except ArcticError as error:
        print(f"arctic: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    if _serve(args):
        print("arctic: vLLM's engine died; its error is above", file=sys.stderr)
        sys.exit(ENGINE_DIED)


if __name__ == "__main__":
    main()
