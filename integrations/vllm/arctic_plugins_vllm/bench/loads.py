"""Loads: when requests arrive, and how many tokens each has. Read and drawn here, sent by ``client.py``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from arctic_plugins.errors import ConfigError, DataError

__all__ = ["Load", "Request", "batches", "fit", "poisson", "read_trace", "replay"]

LONGEST_LINE = 1 << 20
"""Maximum number of characters in a line of a trace."""
MOST_REQUESTS = 1_000_000
"""Maximum number of requests of a load: each takes about 100 bytes here, and more once it has been answered."""
MOST_TOKENS = 1 << 24
"""Maximum length of a prompt or a response in tokens, larger than any model's context."""
LONGEST = 30 * 24 * 3600.0
"""Maximum seconds from the first arrival of a load to its last."""

Arrival = Literal["traced", "random", "uniform"]


@dataclass(frozen=True, slots=True)
class Request:
    """A request of a load.

    Attributes:
        arrival: seconds after the load begins.
        prompt_length, response_length: in tokens.
    """

    arrival: float
    prompt_length: int
    response_length: int


@dataclass(frozen=True)
class Load:
    """Requests that are measured together: one row of the table and one point of a curve.

    Attributes:
        name: unique within a benchmark.
        curve: loads of the same curve differ only in ``intensity``.
        intensity: batch size or requests per second, as the curve's points are labeled.
        requests: in order of arrival.
        clients: most requests in flight; None if there is no limit.
    """

    name: str
    curve: str
    intensity: str
    requests: tuple[Request, ...]
    clients: int | None = None

    @property
    def span(self) -> float:
        """Seconds from the beginning to the last arrival."""
        return self.requests[-1].arrival


def batches(sizes: Sequence[int], prompt_lengths: Sequence[int], response_length: int) -> list[Load]:
    """Return a load for each prompt length and size: that many requests which arrive together."""
    return [
        Load(
            name=f"{size} x {length}",
            curve=f"prompts of {length}",
            intensity=str(size),
            requests=(Request(0.0, length, response_length),) * size,
        )
        for length in prompt_lengths
        for size in sizes
    ]


def poisson(count: int, rate: float, seed: int) -> np.ndarray:
    """Return the arrivals ``[count]`` (float64, in seconds) of a Poisson process of ``rate`` per second.

    The first arrives at 0. Intervals are not rescaled, so their sum varies with the seed as it would in reality.
    """
    intervals = np.random.default_rng(seed).exponential(1 / rate, count)
    return np.cumsum(intervals) - intervals[0]


def read_trace(path: Path, most: int | None = None) -> list[Request]:
    """Read a trace in the format of Snowflake's benchmark of Arctic: JSON lines, one for each arrival.

    ``{"timestamp": milliseconds, "queries": [{"prompt_length": tokens, "response_length": tokens}, ...]}``; other keys
    are ignored. Queries of one line arrive together. The first request arrives at 0, and lines may be in any order.

    Args:
        path: the file, which may come from anyone.
        most: read only this many requests, from the beginning of the file.

    Raises:
        DataError: the file is absent, has no request or too many, or a line is malformed; the message has its number.
    """
    if not path.is_file():
        raise DataError(f"there is no trace {path}", expected="a file of JSON lines", fix="correct the path")
    try:
        with path.open(encoding="utf-8") as file:
            requests = list(islice(_queries(file, path), MOST_REQUESTS + 1 if most is None else most))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", expected="a file of JSON lines in UTF-8") from error
    if not requests:
        raise DataError(f"{path} has no request", expected="at least one line with a query")
    if len(requests) > MOST_REQUESTS:
        raise DataError(f"{path} has more than {MOST_REQUESTS} requests", fix="use fewer with --requests")
    start = min(request.arrival for request in requests)
    requests = [replace(request, arrival=request.arrival - start) for request in requests]
    return sorted(requests, key=lambda request: request.arrival)


def _queries(file: Any, path: Path) -> Iterator[Request]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) > LONGEST_LINE:
            raise DataError(f"{where} is longer than {LONGEST_LINE} characters", fix="split its queries over lines")
        if not line.strip():
            continue
        entry = _parsed(line, where)
        queries = entry.get("queries") if isinstance(entry, dict) else None
        if not isinstance(queries, list):
            raise DataError(
                f"{where} has no list 'queries'",
                expected='{"timestamp": ms, "queries": [{"prompt_length": n, "response_length": m}]}',
            )
        time = _number(entry, "timestamp", where) / 1000
        for query in queries:
            if not isinstance(query, dict):
                raise DataError(f"{where}: found {str(query)[:100]!r} among its queries", expected="an object")
            yield Request(time, _length(query, "prompt_length", where), _length(query, "response_length", where))


def _parsed(line: str, where: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number of JSON")

    try:
        return json.loads(line, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error or type(error).__name__}") from error


def _number(entry: Mapping[str, Any], key: str, where: str) -> float:
    value: Any = entry.get(key)
    if type(value) not in (int, float) or not 0 <= value <= 1e15 or not math.isfinite(value):
        raise DataError(f"{where}: '{key}' is {str(value)[:100]}", expected="milliseconds, from 0 to 1e15")
    return float(value)


def _length(entry: Mapping[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if type(value) is not int or not 1 <= value <= MOST_TOKENS:
        raise DataError(f"{where}: '{key}' is {str(value)[:100]}", expected=f"a number of tokens, 1 to {MOST_TOKENS}")
    return value


def replay(
    requests: Sequence[Request],
    *,
    arrival: Arrival = "traced",
    rate: float | None = None,
    prompt_length: int | None = None,
    response_length: int | None = None,
    seed: int = 0,
) -> tuple[Request, ...]:
    """Return ``requests`` of a trace with other arrivals and lengths.

    Args:
        requests: in order of arrival, the first at 0.
        arrival: ``traced`` keeps the arrivals, ``random`` draws a Poisson process, ``uniform`` has equal intervals.
        rate: requests per second on average, ``(count - 1) / span``; by default that of the trace. Traced arrivals are
            scaled to it.
        prompt_length, response_length: of every request, in tokens; by default those of the trace.
        seed: of random arrivals.

    Raises:
        ConfigError: all requests of the trace arrive at the same time, and ``rate`` is absent or cannot be reached; or
            the last would arrive after more than 30 days.
    """
    times = np.array([request.arrival for request in requests])
    count, span = len(times), float(times[-1])
    if arrival == "traced" and rate is not None and count > 1:
        if not span:
            raise ConfigError(
                "all requests of the trace arrive at the same time, which no factor turns into another rate",
                fix="use --arrival random or --arrival uniform",
            )
        times = times * ((count - 1) / span / rate)
    elif arrival != "traced" and count > 1:
        if rate is None and not span:
            raise ConfigError(
                "all requests of the trace arrive at the same time, so it has no rate", fix="set one with --rates"
            )
        rate = rate if rate is not None else (count - 1) / span
        times = poisson(count, rate, seed) if arrival == "random" else np.arange(count) / rate
    if not times[-1] <= LONGEST:  # also if it is NaN
        raise ConfigError(
            f"the last request would arrive after {times[-1] / 86400:.3g} days",
            expected=f"at most {LONGEST / 86400:.0f}",
            fix="set a higher rate with --rates, or use fewer requests with --requests",
        )
    return tuple(
        Request(
            float(time),
            request.prompt_length if prompt_length is None else prompt_length,
            request.response_length if response_length is None else response_length,
        )
        for time, request in zip(times, requests, strict=True)
    )


def fit(load: Load, limit: int, *, clip: bool) -> Load:
    """Return ``load`` if each prompt and its response fit into ``limit`` tokens, the model's context.

    Args:
        load: the load.
        limit: tokens of a prompt and its response together.
        clip: shorten what does not fit: first the prompt, to no less than one token, then the response.

    Raises:
        ConfigError: requests do not fit, and ``clip`` is false; or ``limit`` is less than 2.
    """
    long = [request for request in load.requests if request.prompt_length + request.response_length > limit]
    if not long:
        return load
    if not clip or limit < 2:
        worst = max(long, key=lambda request: request.prompt_length + request.response_length)
        raise ConfigError(
            f"{len(long)} of {len(load.requests)} requests of '{load.name}' exceed the model's {limit} tokens, the "
            f"longest with {worst.prompt_length} + {worst.response_length}",
            fix="use --clip, or other lengths, or serve the model with a larger --max-model-len",
        )

    def clipped(request: Request) -> Request:
        response = min(request.response_length, limit - 1)
        return replace(request, prompt_length=min(request.prompt_length, limit - response), response_length=response)

    return replace(load, requests=tuple(map(clipped, load.requests)))
