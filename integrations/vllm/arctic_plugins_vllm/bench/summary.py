"""Figures of a measurement, and ratios of two with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = [
    "COMPARED",
    "FEWEST_ROUNDS",
    "LATENCIES",
    "PERCENTILES",
    "Measurement",
    "Record",
    "compare",
    "in_flight",
    "interval",
    "summarize",
]

PERCENTILES = (50, 90, 95, 99)
LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2e": "end-to-end latency",
}
"""Latencies, all from when a request was sent. The time per output token is a request's mean without its first token;
inter-token latencies are the single intervals between chunks.
"""
RESAMPLES = 10_000
FEWEST_ROUNDS = 4
"""With fewer rounds, the bootstrap has no finite interval: too many resamples consist of one round."""


@dataclass(frozen=True, slots=True)
class Record:
    """What became of a request.

    Attributes:
        arrival, sent: seconds after the measurement began.
        ttft, latency: seconds from sending to the first and to the last token.
        itl: seconds between the chunks of the response.
        prompt_tokens, response_tokens: as the server counts them.
        error: one line if the request failed.
    """

    arrival: float
    sent: float
    ttft: float = 0.0
    latency: float = 0.0
    itl: Sequence[float] = ()
    prompt_tokens: int = 0
    response_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Measurement:
    """One round of one load on one server.

    Attributes:
        records: of all requests, in order of arrival.
        seconds: from the first request sent to the end of the last.
        counters: how much the server's counters (``/metrics``) increased.
    """

    records: Sequence[Record]
    seconds: float
    counters: Mapping[str, float] = field(default_factory=dict)


def latencies(records: Iterable[Record]) -> dict[str, np.ndarray]:
    """Return the latencies of :data:`LATENCIES` in seconds (float64), of requests that succeeded.

    One for each request, except inter-token latencies. A response of one token has no time per output token.
    """
    good = [record for record in records if record.error is None]
    values = {
        "ttft": [record.ttft for record in good],
        "tpot": [
            (record.latency - record.ttft) / (record.response_tokens - 1)
            for record in good
            if record.response_tokens > 1
        ],
        "itl": [value for record in good for value in record.itl],
        "e2e": [record.latency for record in good],
    }
    return {name: np.array(found, dtype=np.float64) for name, found in values.items()}


def summarize(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return the figures of all rounds of a load together, with JSON types.

    Latencies are in seconds: mean and percentiles (linear interpolation, as numpy's default), None without a value.
    """
    records = [record for measurement in measurements for record in measurement.records]
    good = [record for record in records if record.error is None]
    seconds = sum(measurement.seconds for measurement in measurements)
    late = [record.sent - record.arrival for record in records]
    counters: dict[str, float] = {}
    for measurement in measurements:
        for name, value in measurement.counters.items():
            counters[name] = counters.get(name, 0) + value
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "seconds": seconds,
        "prompt_tokens": sum(record.prompt_tokens for record in good),
        "response_tokens": sum(record.response_tokens for record in good),
        "requests_per_second": len(good) / seconds if seconds else None,
        "tokens_per_second": sum(record.response_tokens for record in good) / seconds if seconds else None,
        "most_in_flight": max(max(in_flight(measurement.records)[1]) for measurement in measurements),
        "sent_late": {"p50": float(np.median(late)), "max": max(late)},
        **{name: _spread(values) for name, values in latencies(records).items()},
        "counters": counters,
    }


def _spread(values: np.ndarray) -> dict[str, float | None]:
    if not len(values):
        return {"mean": None, **{f"p{percent}": None for percent in PERCENTILES}}
    found = np.percentile(values, PERCENTILES)
    return {
        "mean": float(values.mean()),
        **{f"p{percent}": float(value) for percent, value in zip(PERCENTILES, found, strict=True)},
    }


def in_flight(records: Sequence[Record]) -> tuple[list[float], list[int]]:
    """Return how many requests were in flight over time: seconds, and the number from each of them to the next."""
    changes = sorted(change for record in records for change in ((record.sent, 1), (record.sent + record.latency, -1)))
    return [time for time, _ in changes], np.cumsum([change for _, change in changes]).tolist()


def _percentile(name: str, percent: int) -> Callable[[Measurement], float]:
    def figure(measurement: Measurement) -> float:
        values = latencies(measurement.records)[name]
        return float(np.percentile(values, percent)) if len(values) else float("nan")

    return figure


COMPARED: dict[str, Callable[[Measurement], float]] = {
    "tokens_per_second": lambda measurement: (
        sum(record.response_tokens for record in measurement.records if record.error is None) / measurement.seconds
        if measurement.seconds
        else float("nan")
    ),
    "ttft_p50": _percentile("ttft", 50),
    "tpot_p50": _percentile("tpot", 50),
    "e2e_p50": _percentile("e2e", 50),
    "e2e_p99": _percentile("e2e", 99),
}
"""The figures of a round that :func:`compare` compares."""


def compare(first: Sequence[Measurement], second: Sequence[Measurement]) -> dict[str, dict[str, float | None]]:
    """Return the ratios second / first of the figures :data:`COMPARED`, with 95 % confidence intervals.

    Args:
        first, second: the rounds of a load on two servers; rounds of the same index were measured one after the other.

    Returns:
        Figure -> ``ratio`` (geometric mean over the rounds), ``low`` and ``high``; None for a figure without values,
            and for the interval of fewer than :data:`FEWEST_ROUNDS` rounds.
    """
    result: dict[str, dict[str, float | None]] = {}
    for name, figure in COMPARED.items():
        pairs = np.array([[figure(one), figure(other)] for one, other in zip(first, second, strict=True)])
        if not np.all(np.isfinite(pairs)) or np.any(pairs <= 0):
            result[name] = {"ratio": None, "low": None, "high": None}
            continue
        logs = np.log(pairs[:, 1] / pairs[:, 0])
        low, high = interval(logs) if len(logs) >= FEWEST_ROUNDS else (None, None)
        result[name] = {
            "ratio": float(np.exp(logs.mean())),
            "low": None if low is None else float(np.exp(low)),
            "high": None if high is None else float(np.exp(high)),
        }
    return result


def interval(values: np.ndarray, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return a confidence interval of the mean of independent ``values [n]``, by the bootstrap-t.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 12.5. Percentiles of resampled means, the
    simpler way, would cover the mean of five normal values in 83 % of cases instead of 95 %.

    Args:
        values: float64; at least :data:`FEWEST_ROUNDS`.
        confidence: the probability to cover the mean.
        seed: of the resamples.
    """
    count, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) / count**0.5
    if not error:
        return mean, mean
    drawn = values[np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))]
    means, errors = drawn.mean(axis=1), drawn.std(axis=1, ddof=1) / count**0.5
    different = errors > 1e-9 * error  # a resample of one value says nothing about its error
    scores = np.full(RESAMPLES, np.inf)
    scores[different] = (means[different] - mean) / errors[different]
    scores[~different] *= np.sign(means[~different] - mean)
    low, high = np.quantile(scores, ((1 + confidence) / 2, (1 - confidence) / 2), method="nearest")
    return mean - float(low) * error, mean - float(high) * error
