"""vLLM's OpenAI server with option values as JSON: ``python -m arctic_plugins_vllm.server JSON [OPTION...]``.

Read in vllm 0.32.0. ``JSON`` is an object of option -> value, which applies to options that the command line does not
set. Some values come from a checkpoint's files, so they must never be parsed as a command line. vLLM's ``--config
FILE`` would do that (``FlexibleArgumentParser._pull_args_from_config``).
"""

from __future__ import annotations

import argparse
import errno
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from arctic_plugins_vllm.ending import ENDING, ENGINE_DIED, RefuseWhenStopping, tell_death

__all__ = ["ENGINE_DIED", "parse"]

DRAIN = 20
"""Default of ``--shutdown-timeout``: seconds in which requests may finish once the server is asked to stop.

vLLM's own, 0, aborts them. Kubernetes kills a process after 30 s.
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
    parser.set_defaults(**{"shutdown_timeout": DRAIN, **values, "lora_modules": modules or None})
    return parser.parse_args(list(options))


def _serve(args: argparse.Namespace) -> bool:
    """Serve until a signal arrives or the engine dies. Return whether it died."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.api_server import entry

    from arctic_plugins.patches import patch

    why = "tells whether the engine died or was stopped: both end the server with status 0"
    patch(entry, "build_async_engine_client", why=why, read_in="vllm 0.32.0")(ENDING.watched)
    args.middleware = [*args.middleware, f"{RefuseWhenStopping.__module__}.{RefuseWhenStopping.__name__}"]
    try:
        ServeSubcommand.cmd(args)  # with several API servers or nodes, or data parallelism, as 'vllm serve' does
    finally:
        ENDING.over.set()
    # A node without a server waits for its workers: it returns if one of them ends, and exits if a signal arrives.
    return ENDING.died or args.headless


def main() -> None:
    """Run the server like vLLM's ``entry.main``."""
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    from arctic_plugins.errors import ArcticError, ConfigError

    cli_env_setup()
    try:
        args = parse(json.loads(sys.argv[1]), sys.argv[2:])
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
        died = _serve(args)
    except ArcticError as error:
        print(f"arctic: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # What `check_address` cannot see: of `--config` or `--uds`, or of a server that was starting at the same time.
        print(f"arctic: {error.strerror}; set --port, --host or --uds to another", file=sys.stderr)
        sys.exit(ConfigError.exit_status)
    except KeyboardInterrupt:  # before the engine was started
        sys.exit(128 + signal.SIGINT)
    if died:
        tell_death()
        sys.exit(ENGINE_DIED)


if __name__ == "__main__":
    main()
