"""Check and measure this project on one GPU, in eight minutes.

    make gpu
    python benchmarks/gpu.py [--json out/gpu.json] [--sections kernels,headline] [--memory 80] [--time 480]
    python benchmarks/gpu.py --device cpu --small      # test the script itself, on any machine

Needs torch, transformers, peft, accelerate, pytest and the few libraries of the core, but no network, and nothing of
this project installed: the packages run from this checkout. What the sections measure is in docs/gpu.md, and in
gpu_sections.py. Each section runs in a process of its own, which is ended when its time is up; figures are printed and
written to the JSON file as they come. Time that a section leaves is added to that of the next ones.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUDGETS = {"tests": 110, "kernels": 100, "step": 50, "offload": 70, "mixture": 40, "headline": 110}
"""Section -> its seconds of the default ``--time``. The last one gets all that the others leave."""
NEEDED = (
    *("torch", "transformers", "peft", "accelerate", "pytest"),
    *("click", "packaging", "platformdirs", "pluggy", "psutil", "pydantic", "rich", "xxhash", "yaml"),
)
MARK = "figure "
"""Begins a line of a section's output that holds a figure, as JSON."""
Figure = dict[str, Any]


@contextmanager
def exposed() -> Iterator[None]:
    """Make this checkout's packages importable, and their entry points visible, here and in child processes.

    Their metadata is written to a directory that exists as long as the context.
    """
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["arctic-plugins"]["distributions"]
    parts = [ROOT, *sorted(path.parent for folder in workspace for path in ROOT.glob(f"{folder}/pyproject.toml"))]
    with tempfile.TemporaryDirectory() as site:
        for part in parts:
            project = tomllib.loads((part / "pyproject.toml").read_text())["project"]
            name, version = project["name"], project["version"]
            metadata = Path(site) / f"{name.replace('-', '_')}-{version}.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            groups = {**project.get("entry-points", {}), "console_scripts": project.get("scripts", {})}
            lines = [
                line
                for group, points in groups.items()
                for line in (f"[{group}]", *(f"{point} = {value}" for point, value in points.items()))
            ]
            (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
        paths = [site, *map(str, parts)]
        sys.path[:0] = paths
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
        yield


class Report:
    """The figures so far, in a file that is written with each of them, and as one table at the end."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**about, "sections": {}}
        path.parent.mkdir(parents=True, exist_ok=True)

    def begin(self, section: str) -> dict[str, Any]:
        """Return the entry of ``section``, to which the caller adds."""
        entry: dict[str, Any] = {"status": "running", "why": "", "seconds": 0.0, "figures": []}
        self.content["sections"][section] = entry
        self.save()
        return entry

    def save(self) -> None:
        """Write the file, whole or not at all."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)

    @property
    def broken(self) -> bool:
        """Whether a section failed, or a test."""
        return any(entry["status"] == "failed" for entry in self.content["sections"].values())

    def show(self) -> None:
        """Print the table."""
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        # Where the output is not a terminal, the table is one for docs/gpu.md.
        terminal = sys.stdout.isatty()
        table = Table(box=None, pad_edge=False) if terminal else Table(box=box.MARKDOWN)
        table.add_column("section", no_wrap=True)
        for column in ("measured", "figure", "target"):
            table.add_column(column, overflow="fold")
        table.add_column("", no_wrap=True)
        marks = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}
        for section, entry in self.content["sections"].items():
            for figure in entry["figures"]:
                text = (figure["name"], figure["text"], figure["target"])
                table.add_row(section, *map(escape, text), marks[figure["met"]])
            if entry["status"] != "done":
                table.add_row(section, f"[yellow]{entry['status']}[/]", escape(entry["why"]), "", "")
        console = Console() if terminal else Console(width=400)
        console.print(table)
        versions = ", ".join(f"{name} {version}" for name, version in self.content["versions"].items())
        seconds = f"{self.content['seconds']:.0f} s"
        console.print(escape(f"{self.content['card']}; {versions}; {seconds}; written to {self.path}"))


def watch(command: Sequence[str], seconds: float, add: Callable[[Figure], None], log: Path) -> tuple[str, str]:
    """Run a section in a process of its own, and pass on its figures as it prints them.

    Args:
        command: what to run.
        seconds: when to end it.
        add: takes each figure.
        log: where all its output goes.

    Returns:
        Its status (``done``, ``failed`` or ``out of time``), and why, if it is not done.
    """
    last = "no output"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with (
        log.open("w", buffering=1) as output,
        subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process,
    ):
        assert process.stdout is not None
        expired = threading.Event()

        def end() -> None:
            with suppress(ProcessLookupError):  # its children too, which may have the pipe open
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, lambda: (expired.set(), end()))
        timer.start()
        try:
            for line in process.stdout:
                output.write(line)
                if line.startswith(MARK):
                    add(json.loads(line.removeprefix(MARK)))
                elif line.strip():
                    last = line.strip()
            process.wait()
        finally:
            timer.cancel()
            end()
    if expired.is_set():
        return "out of time", f"ended after {seconds:.0f} s; the figures above are complete"
    if process.returncode:
        return "failed", f"exit status {process.returncode}: {last}; see {log}"
    return "done", ""


def run_section(
    name: str, options: argparse.Namespace, seconds: float, add: Callable[[Figure], None]
) -> tuple[str, str]:
    """Run one section: on a GPU in a process of its own, whose memory and context cannot spoil the next one's."""
    arguments = ["--device", options.device, "--memory", str(options.memory), "--until", str(time.time() + seconds)]
    arguments += ["--small"] if options.small else []
    if options.device == "cuda" or name == "tests":  # pytest cannot run within the test of this script
        command = [sys.executable, str(Path(__file__).with_name("gpu_sections.py")), name, *arguments]
        return watch(command, seconds, add, options.json.with_name(f"{options.json.stem}-{name}.log"))
    import gpu_sections

    try:
        gpu_sections.main([name, *arguments], add=add)
    except Exception as error:  # the other sections are worth having
        return "failed", f"{type(error).__name__}: {error}"
    return "done", ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, and return the exit status: 1 if a section or a test failed, whatever targets are missed."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "gpu.json", help="where figures are written")
    parser.add_argument("--sections", default=",".join(BUDGETS), help="separated by commas (default: %(default)s)")
    parser.add_argument(
        "--memory", type=float, default=80, help="GiB of the card to use at most (default: %(default)s)"
    )
    parser.add_argument("--time", type=float, default=sum(BUDGETS.values()), help="seconds (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to test the script")
    options = parser.parse_args(arguments)
    names = options.sections.split(",")
    if unknown := [name for name in names if name not in BUDGETS]:
        parser.error(f"unknown section {unknown[0]!r}; there are {', '.join(BUDGETS)}")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        parser.error(f"not installed: {', '.join(missing)}")
    if options.device == "cuda" and importlib.import_module("torch").cuda.device_count() == 0:
        parser.error("torch finds no CUDA device; --device cpu --small tests the script without one")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    versions["python"] = platform.python_version()
    about = {"date": datetime.now(UTC).date().isoformat(), "card": "unknown", "versions": versions}
    report = Report(options.json, about | {"memory_gib": options.memory, "small": options.small})
    try:
        for position, name in enumerate(names):
            later = sum(BUDGETS[other] for other in names[position + 1 :]) * options.time / sum(BUDGETS.values())
            entry, since = report.begin(name), time.monotonic()
            seconds = options.time - (since - began) - later

            def add(figure: Figure, entry: dict[str, Any] = entry, name: str = name) -> None:
                if card := figure.get("card"):  # this process makes no context on the card to ask it
                    report.content["card"] = card
                    return
                entry["figures"].append(figure)
                report.save()
                print(f"{name}: {figure['name']}: {figure['text']}", flush=True)

            entry["status"], entry["why"] = "skipped", "no time was left"
            if seconds > 0:
                entry["status"], entry["why"] = "interrupted", "the script was ended"
                entry["status"], entry["why"] = run_section(name, options, seconds, add)
            entry["seconds"] = round(time.monotonic() - since, 1)
            report.save()
    finally:
        report.content["seconds"] = round(time.monotonic() - began, 1)
        report.save()
        report.show()
    return int(report.broken)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with exposed():
        sys.exit(main())
