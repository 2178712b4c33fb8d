"""vLLM's OpenAI server with options that are values: ``python -m arctic_plugins_vllm.server JSON [OPTION...]``. Read in
vllm 0.32.0.

``JSON`` is an object of option -> value, which stand where the command line says nothing. They partly come out of a
checkpoint's files, and never pass through a line of options: vLLM's ``--config FILE`` would put them there
(``FlexibleArgumentParser._pull_args_from_config``).
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
"""Status where the engine died under the server: EX_SOFTWARE of ``sysexits.h``. vLLM's own ends with 0 then, and no
supervisor starts it again.
"""


def parse(values: Mapping[str, Any], options: Sequence[str]) -> argparse.Namespace:
    """The options of vLLM's server: ``options`` as its command line reads them, before ``values``, before its defaults.

    Raises:
        ConfigError: a value for an option that this vLLM does not have.
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
    """Serve until a signal comes, or the engine dies: whether it died."""
    import uvloop
    from vllm.entrypoints.launchers.api_server import entry

    from arctic_plugins.patches import patch

    asked, died = False, False
    read_in, why = "vllm 0.32.0", "whether the engine died or was asked to end: both end the server with status 0"

    @patch(entry, "build_async_engine_client", why=why, read_in=read_in)
    @asynccontextmanager
    async def watched(build: Callable[..., Any], *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        async with build(*arguments, **keywords) as engine:

            @patch(engine, "shutdown", why=why, read_in=read_in)
            def asked_to(shutdown: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
                nonlocal asked
                asked = True  # by a signal, see ``serve_http``; it leaves the engine as its death does
                return shutdown(*arguments, **keywords)

            try:
                yield engine
            finally:
                nonlocal died
                died = engine.errored and not asked

    uvloop.run(entry.run_server(args))
    return died


def main() -> None:
    """As ``entry.main`` of vLLM."""
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
