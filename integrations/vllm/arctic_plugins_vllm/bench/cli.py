"""``arctic bench batch | online | trace``."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from arctic_plugins_vllm.bench.loads import Load

__all__ = ["bench"]


def _numbers(kind: type[int] | type[float]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Return a callback that reads positive numbers separated by commas."""

    def read(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...] | None:
        if value is None:
            return None
        try:
            numbers = tuple(kind(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(number > 0 for number in numbers):  # NaN is not, either
            raise click.BadParameter(f"'{value}' is not a list of positive numbers, for example 1,2,4")
        if len(set(numbers)) < len(numbers):
            raise click.BadParameter(f"'{value}' contains a number twice")
        return numbers

    return read


def _number(_: click.Context, __: click.Parameter, value: float) -> float:
    """Refuse NaN, which click's ranges contain."""
    if math.isnan(value):
        raise click.BadParameter("nan is not a number")
    return value


def _object(_: click.Context, __: click.Parameter, value: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise click.BadParameter(f"""'{value}' is not a JSON object, for example {{"temperature": 1}}""")
    return found


LENGTH = click.IntRange(1, 1 << 24)
SECONDS: dict[str, Any] = {
    "type": click.FloatRange(0, 30 * 24 * 3600, min_open=True),
    "callback": _number,
    "default": 600.0,
}
_OPTIONS: Sequence[Callable[[Any], Any]] = [
    click.argument("server", nargs=-1, type=click.UNPROCESSED, metavar="[CHECKPOINT] [SERVE_OPTIONS]..."),
    click.option("--base-url", help="Measure the OpenAI-compatible server at this URL instead of starting one."),
    click.option(
        "--compare",
        nargs=2,
        metavar="A B",
        help="Measure two servers in turns. A and B are URLs, or arguments of 'arctic serve' in quotes; options after "
        "them are passed to each server that is started.",
    ),
    click.option("--model", help="Name of the model, if the server has several (an adapter); by default the first."),
    click.option("--tokenizer", help="Directory or Hub id of the tokenizer; by default the served model's."),
    click.option("--rounds", type=click.IntRange(1, 1000), help="How often to measure: 1, or 5 to compare."),
    click.option("--clip", is_flag=True, help="Shorten prompts that exceed the model's context, instead of refusing."),
    click.option(
        "--ignore-eos/--no-ignore-eos",
        default=True,
        help="Whether responses have exactly the requested length (a field that vLLM adds to the API).",
    ),
    click.option(
        "--extra-body",
        callback=_object,
        metavar="JSON",
        default='{"temperature": 0}',
        show_default=True,
        help="Further fields of every request.",
    ),
    click.option("--timeout", show_default=True, **SECONDS, help="Seconds until a request has failed."),
    click.option("--startup-timeout", show_default=True, **SECONDS, help="Seconds until a server has to answer."),
    click.option(
        "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of prompts and arrivals."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        help="Write result.json, requests.jsonl and report.html to this new directory.",
    ),
]


class _Command(click.Command):
    """A command that remembers its arguments for the record, and passes unknown options on to ``arctic serve``."""

    ignore_unknown_options = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[__name__] = list(args)
        return super().parse_args(ctx, args)


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_clients = click.option(
    "--clients", type=click.IntRange(1, 100_000), help="Most requests in flight; by default no limit."
)


@click.group(short_help="Measure the latency and throughput of a server.")
def bench() -> None:
    """Measure the latency and throughput of a checkpoint that is served for this purpose, or of any OpenAI-compatible
    server.

    Prompts are random tokens of the served tokenizer. The exit status is 1 if a request failed.

    \b
    Example:
      arctic bench batch out-merged --sizes 1,2,4,8 --prompt-lengths 128
      arctic bench online out-merged --rates 1,2,4 --requests 200 --out result
      arctic bench trace trace.jsonl --base-url http://127.0.0.1:8000 --rates 2
      arctic bench online --compare out-merged "out-merged --plugins fp8"
    """


@bench.command(cls=_Command, short_help="Requests that arrive together.")
@click.option(
    "--sizes",
    callback=_numbers(int),
    metavar="1,2,4",
    default="1,2,4,8",
    show_default=True,
    help="Numbers of requests.",
)
@click.option(
    "--prompt-lengths",
    callback=_numbers(int),
    metavar="1,2,4",
    default="128",
    show_default=True,
    help="Lengths of prompts in tokens.",
)
@click.option("--response-length", type=LENGTH, default=64, show_default=True, help="Length of responses in tokens.")
@_shared
@click.pass_context
def batch(
    context: click.Context,
    /,
    sizes: tuple[int, ...],
    prompt_lengths: tuple[int, ...],
    response_length: int,
    **options: Any,
) -> None:
    """Send 1, 2, 4 or more requests at once, for each prompt length, and wait for all responses.

    \b
    Example:
      arctic bench batch out-merged --sizes 1,8,32 --prompt-lengths 128,1024 --max-model-len 2048
    """
    from arctic_plugins.errors import ConfigError
    from arctic_plugins_vllm.bench.loads import MOST_REQUESTS, MOST_TOKENS, batches

    if max(sizes) > MOST_REQUESTS or max(prompt_lengths) > MOST_TOKENS:
        raise ConfigError(
            f"found a size of {max(sizes)} and a prompt length of {max(prompt_lengths)}",
            expected=f"at most {MOST_REQUESTS} and {MOST_TOKENS}",
        )
    _run(context, batches(sizes, prompt_lengths, response_length), **options)


@bench.command(cls=_Command, short_help="Requests that arrive at random.")
@click.option(
    "--rates",
    callback=_numbers(float),
    metavar="1,2,4",
    default="1",
    show_default=True,
    help="Requests per second on average; may be inf.",
)
@click.option(
    "--requests", type=click.IntRange(1, 1_000_000), default=100, show_default=True, help="Requests for each rate."
)
@click.option("--prompt-length", type=LENGTH, default=128, show_default=True, help="Length of prompts in tokens.")
@click.option("--response-length", type=LENGTH, default=64, show_default=True, help="Length of responses in tokens.")
@_clients
@_shared
@click.pass_context
def online(
    context: click.Context,
    /,
    rates: tuple[float, ...],
    requests: int,
    prompt_length: int,
    response_length: int,
    clients: int | None,
    **options: Any,
) -> None:
    """Send requests that arrive as a Poisson process, whether or not earlier ones have been answered.

    \b
    Example:
      arctic bench online out-merged --rates 1,2,4,8 --requests 200
    """
    from arctic_plugins_vllm.bench.loads import Load, Request, replay

    alike = (Request(0.0, prompt_length, response_length),) * requests
    loads = [
        Load(
            name=f"{rate:g} req/s",
            curve=f"{prompt_length} + {response_length} tokens",
            intensity=f"{rate:g}/s",
            requests=replay(alike, arrival="random", rate=rate, seed=options["seed"]),
            clients=clients,
        )
        for rate in rates
    ]
    _run(context, loads, **options)


@bench.command(cls=_Command, short_help="Requests of a recorded trace.")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--arrival",
    type=click.Choice(["traced", "random", "uniform"]),
    default="traced",
    show_default=True,
    help="When requests arrive: as in the trace, as a Poisson process, or at equal intervals.",
)
@click.option(
    "--rates",
    callback=_numbers(float),
    metavar="1,2,4",
    help="Requests per second on average; by default that of the trace.",
)
@click.option("--requests", type=click.IntRange(1, 1_000_000), help="Most requests, from the beginning of the trace.")
@click.option("--prompt-length", type=LENGTH, help="Length of all prompts in tokens; by default as in the trace.")
@click.option("--response-length", type=LENGTH, help="Length of all responses in tokens; by default as in the trace.")
@_clients
@_shared
@click.pass_context
def trace(
    context: click.Context,
    /,
    trace: Path,
    arrival: Any,
    rates: tuple[float, ...] | None,
    requests: int | None,
    prompt_length: int | None,
    response_length: int | None,
    clients: int | None,
    **options: Any,
) -> None:
    """Send the requests of TRACE, a file of JSON lines:

    {"timestamp": milliseconds, "queries": [{"prompt_length": tokens, "response_length": tokens}]}

    \b
    Example:
      arctic bench trace trace.jsonl out-merged --arrival random --rates 2,4 --requests 200
    """
    from arctic_plugins_vllm.bench.loads import Load, read_trace, replay

    found = read_trace(trace, requests)
    loads = [
        Load(
            name=trace.stem if rate is None else f"{rate:g} req/s",
            curve=trace.stem,
            intensity="" if rate is None else f"{rate:g}/s",
            requests=replay(
                found,
                arrival=arrival,
                rate=rate,
                prompt_length=prompt_length,
                response_length=response_length,
                seed=options["seed"],
            ),
            clients=clients,
        )
        for rate in rates or [None]
    ]
    _run(context, loads, **options)


def _targets(
    server: Sequence[str], base_url: str | None, compare: tuple[str, str] | None
) -> dict[str, str | list[str]]:
    """Return the name of each target -> its URL, or the arguments of ``arctic serve`` that start it.

    Raises:
        ConfigError: there is no target, there are too many, or what is given is neither.
    """
    from arctic_plugins.errors import ConfigError

    if compare is not None:
        if base_url is not None or (server and not server[0].startswith("-")):
            raise ConfigError("found --compare and another server", fix="name the two servers after --compare only")
        found = {name: _target(text, server) for name, text in zip("AB", compare, strict=True)}
        if server and all(isinstance(target, str) for target in found.values()):
            raise ConfigError(f"found {server[0]}, but no server is started", fix="leave it out, or correct its name")
        return found
    if base_url is not None:
        if server:
            raise ConfigError(
                f"found --base-url and {server[0]}", fix="start the server with its options, or leave out --base-url"
            )
        return {"": _target(base_url, (), only_url=True)}
    if not server or server[0].startswith("-"):
        text = f"found {server[0]} in place of CHECKPOINT" if server else "no server is named"
        raise ConfigError(text, expected="CHECKPOINT, --base-url URL or --compare A B", fix="see 'arctic bench --help'")
    return {"": _arguments(server)}


def _target(text: str, options: Sequence[str], *, only_url: bool = False) -> str | list[str]:
    from arctic_plugins.errors import ConfigError
    from arctic_plugins_vllm.bench.urls import base_url

    if only_url or "://" in text:
        return base_url(text)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} cannot be split into arguments: {error}") from error
    if not words or words[0].startswith("-"):
        raise ConfigError(f"{text!r} names no server", expected="a URL, or a checkpoint and options of 'arctic serve'")
    return _arguments([*words, *options])


def _arguments(words: Sequence[str]) -> list[str]:
    from arctic_plugins.errors import ConfigError

    for word in words:
        if word.partition("=")[0] in ("--host", "--port"):
            raise ConfigError(
                f"found {word}, but the server gets a free port of this machine",
                fix="use --base-url for a server that already runs",
            )
    return list(words)


def _run(
    context: click.Context,
    loads: list[Load],
    *,
    server: tuple[str, ...],
    base_url: str | None,
    compare: tuple[str, str] | None,
    rounds: int | None,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Check everything that can be checked, measure ``loads``, and report."""
    from importlib.util import find_spec

    from arctic_plugins.errors import ConfigError
    from arctic_plugins.resolver import check_hosts

    targets = _targets(server, base_url, compare)
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} exists and is not empty", expected="a new directory", fix="choose another --out")
        if find_spec("matplotlib") is None:
            raise ConfigError(
                "the report needs matplotlib", fix="pip install 'arctic-plugins-vllm[bench]', or leave out --out"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{out} cannot be written: {error.strerror}", fix="choose another --out") from error
    check_hosts((), "vllm")
    from arctic_plugins_vllm.bench.run import Job, run
    from arctic_plugins_vllm.bench.urls import redacted

    run(
        Job(
            benchmark=str(context.info_name),
            command=redacted(["arctic", "bench", str(context.info_name), *context.meta[__name__]]),
            targets=targets,
            loads=loads,
            rounds=rounds or (5 if compare else 1),
            out=out,
            as_json=as_json,
            **options,
        )
    )
