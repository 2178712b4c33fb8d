"""The report of a benchmark as one self-contained HTML page with plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_plugins.page import svg, write_page
from arctic_plugins_vllm.bench import report
from arctic_plugins_vllm.bench.summary import COMPARED, LATENCIES, Measurement, in_flight

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_report"]

TEMPLATE = Path(__file__).with_name("page.html")
COLORS = ("#2563eb", "#ea580c", "#0d9488", "#9333ea", "#64748b", "#ca8a04")
WIDEST = 4.0
"""The largest ratio that is drawn; also the smallest, inverted. Intervals may extend further."""
RATIO_TICKS = ((0.25, 0.5, 1, 2, 4), (0.6, 0.8, 1, 1.25, 1.5), (0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15), (0.98, 1, 1.02))
"""From coarse to fine; the first with three in the range is used."""
MOST_CURVES = 6
"""The most loads whose requests in flight are drawn."""


def write_report(
    result: Mapping[str, Any], measured: Mapping[str, Mapping[str, Sequence[Measurement]]], path: Path
) -> None:
    """Write the page of ``result`` (:func:`arctic_plugins_vllm.bench.report.describe`) to ``path``."""
    plots = {
        "Throughput against latency": _throughput(result),
        "Requests in flight": _in_flight(measured),
        **{f"{LATENCIES[name].capitalize()} ({name.upper()})": _percentiles(result, name) for name in LATENCIES},
    }
    if any(found["ratio"] for load in result["loads"] for found in load.get("ratios", {}).values()):
        first, second = (target["name"] for target in result["targets"])
        plots = {f"Ratios {second} / {first}": _ratios(result), **plots}
    write_page(
        TEMPLATE,
        path,
        result=result,
        plots={title: svg(figure) for title, figure in plots.items()},
        latencies=LATENCIES,
        compared=COMPARED,
        heading=report.heading,
        number=report.number,
        both=report.both,
        ratio=report.ratio,
    )


def _axes(**labels: str) -> tuple[Figure, Axes]:
    """Return a figure that can be read at half the width of the page and on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set(**labels)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _from_zero(axes: Axes) -> None:
    """Let the y axis begin at 0 and end a little above the largest value."""
    top = axes.dataLim.ymax  # not finite without data
    axes.set_ylim(0, 1.12 * top if 0 < top < math.inf else 1)


def _curves(result: Mapping[str, Any]) -> dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]]:
    """Return (curve, target) -> the intensities and figures of its loads."""
    found: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for load in result["loads"]:
        for target, figures in load["results"].items():
            found.setdefault((load["curve"], target), []).append((load["intensity"], figures))
    return found


def _throughput(result: Mapping[str, Any]) -> Figure:
    figure, axes = _axes(xlabel="median end-to-end latency (ms)", ylabel="output tokens per second")
    curves = _curves(result)
    for index, ((curve, target), points) in enumerate(curves.items()):
        known = [
            (1000 * figures["e2e"]["p50"], figures["tokens_per_second"], intensity)
            for intensity, figures in points
            if figures["e2e"]["p50"] is not None
        ]
        color = COLORS[index % len(COLORS)]
        xs, ys = [x for x, _, _ in known], [y for _, y, _ in known]
        axes.plot(xs, ys, marker="o", markersize=4, color=color, label=_label(curve, target))
        for x, y, intensity in known:
            axes.annotate(intensity, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, color=color)
    _from_zero(axes)
    axes.margins(x=0.15)
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False)
    return figure


def _label(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _percentiles(result: Mapping[str, Any], name: str) -> Figure:
    """Draw each load's median as a point, with a thick line to the 90th and a thin one to the 99th percentile."""
    figure, axes = _axes(ylabel="ms")
    targets = [target["name"] for target in result["targets"]]
    for index, target in enumerate(targets):
        shift = 0.3 * (index - (len(targets) - 1) / 2)
        color = COLORS[index]
        for at, load in enumerate(result["loads"]):
            found = load["results"][target][name]
            if found["p50"] is None:
                continue
            middle, high, highest = (1000 * found[key] for key in ("p50", "p90", "p99"))
            axes.vlines(at + shift, middle, highest, color=color, linewidth=1.2)
            axes.vlines(at + shift, middle, high, color=color, linewidth=5, alpha=0.5)
            axes.plot(at + shift, middle, marker="o", markersize=5, color=color, label=target if at == 0 else None)
    names = [load["name"] for load in result["loads"]]
    many = len(names) > 3
    axes.set_xticks(range(len(names)), names, rotation=30 * many, ha="right" if many else "center", fontsize=8)
    axes.set_xlim(-0.6, len(names) - 0.4)
    _from_zero(axes)
    if len(targets) > 1:
        axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def _in_flight(measured: Mapping[str, Mapping[str, Sequence[Measurement]]]) -> Figure:
    """Draw the first round of at most :data:`MOST_CURVES` loads, spread over all of them."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(xlabel="seconds", ylabel="requests in flight")
    every = [(load, target, rounds[0]) for load, targets in measured.items() for target, rounds in targets.items()]
    step = max(1, -(-len(every) // MOST_CURVES))
    for index, (load, target, first) in enumerate(every[::-step][::-1]):  # the last is the heaviest
        times, counts = in_flight(first.records)
        axes.step(times, counts, where="post", color=COLORS[index], linewidth=1.3, label=_label(load, target))
    _from_zero(axes)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if len(every) > 1:
        axes.legend(fontsize=8, frameon=False)
    return figure


def _ratios(result: Mapping[str, Any]) -> Figure:
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, axes = _axes()
    rows = [
        (f"{load['name']}: {report.heading(name)}" if len(result["loads"]) > 1 else report.heading(name), found)
        for load in result["loads"]
        for name, found in load["ratios"].items()
        if found["ratio"] is not None
    ]
    figure.set_size_inches(4.4, max(3.2, 0.8 + 0.22 * len(rows)))
    for at, (_, found) in enumerate(rows):
        if found["low"] is not None:
            axes.hlines(at, found["low"], found["high"], color=COLORS[0], linewidth=1.5)
        axes.plot(found["ratio"], at, marker="o", markersize=5, color=COLORS[0])
    axes.axvline(1, color="#64748b", linestyle="--", linewidth=1)
    ends = [end for _, found in rows for end in (found["low"] or found["ratio"], found["high"] or found["ratio"])]
    axes.set_xscale("log")
    axes.set_xlim(*(min(max(end, 1 / WIDEST), WIDEST) for end in (0.9 * min([1, *ends]), 1.1 * max([1, *ends]))))
    left, right = axes.get_xlim()
    shown = ([tick for tick in ticks if left <= tick <= right] for ticks in RATIO_TICKS)
    axes.xaxis.set_major_locator(FixedLocator(next((ticks for ticks in shown if len(ticks) > 2), [1])))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return figure
