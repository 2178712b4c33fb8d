"""The report of the demo as one self-contained HTML page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arctic_plugins_demo.run import DemoReport

__all__ = ["write_page"]

TEMPLATE = Path(__file__).with_name("report.html")


def write_page(report: DemoReport, path: Path) -> None:
    """Write ``report`` to ``path``, without scripts or anything that a browser would fetch; model output is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(TEMPLATE.read_text("utf-8"))
    templates = sorted(report.scores["before"])
    page = template.render(report=report, templates=templates, loss_curve=Markup(_loss_curve(report)))  # noqa: S704 - contains only numbers
    path.write_text(page, encoding="utf-8")


def _loss_curve(report: DemoReport) -> str:
    """Return the curve as an SVG element."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*report.losses, strict=True), marker=".", color="#2563eb")
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text)
    return text.getvalue()[text.getvalue().index("<svg") :]
