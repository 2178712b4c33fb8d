"""The report of the demo as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from arctic_plugins.page import svg, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from arctic_plugins_demo.run import DemoReport

__all__ = ["write_report"]

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(report: DemoReport, path: Path) -> None:
    """Write ``report`` to ``path``; model output is escaped."""
    write_page(
        TEMPLATE, path, report=report, templates=sorted(report.scores["before"]), loss_curve=svg(_loss_curve(report))
    )


def _loss_curve(report: DemoReport) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*report.losses, strict=True), marker=".", color="#2563eb")
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
