"""A benchmark from its servers to its reports."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from arctic_plugins.errors import ArcticError
from arctic_plugins_vllm.bench import report
from arctic_plugins_vllm.bench.client import Sampling, Target, connect, measure_all
from arctic_plugins_vllm.bench.loads import Load, fit
from arctic_plugins_vllm.bench.summary import Measurement
from arctic_plugins_vllm.bench.urls import redacted
from arctic_plugins_vllm.running import Server

__all__ = ["Job", "run"]

Measured = Mapping[str, Mapping[str, Sequence[Measurement]]]


@dataclass(frozen=True)
class Job:
    """What ``arctic bench`` was asked to do; its options, checked.

    Attributes:
        benchmark: ``batch``, ``online`` or ``trace``.
        command: the command line without secrets, for the record.
        targets: name -> URL, or arguments of ``arctic serve``; one named "", or two.
        loads: what to measure.
        out: an empty directory for the reports.
    """

    benchmark: str
    command: Sequence[str]
    targets: Mapping[str, str | Sequence[str]]
    loads: Sequence[Load]
    rounds: int
    seed: int
    model: str | None
    tokenizer: str | None
    clip: bool
    ignore_eos: bool
    extra_body: Mapping[str, Any]
    timeout: float
    startup_timeout: float
    as_json: bool
    out: Path | None


def run(job: Job) -> None:
    """Start the servers that do not run yet, measure, stop them, and report.

    Raises:
        ArcticError: a server did not start, a first request failed, or, after reporting, any request failed or a server
            that was started has ended.
        ConfigError: a server cannot be used; see :func:`~arctic_plugins_vllm.bench.client.connect`.
    """
    console = Console(stderr=True)
    starts = any(not isinstance(given, str) for given in job.targets.values())
    logs = Path(tempfile.mkdtemp(prefix="arctic-bench-")) if starts else None  # kept if something fails
    with _ended_by_sigterm(), ExitStack() as servers:
        urls, started = dict[str, str](), list[Server]()
        for name, given in job.targets.items():
            if isinstance(given, str) or logs is None:
                urls[name] = str(given)
                continue
            log = logs / f"server{f'-{name}' if name else ''}.log"
            started.append(servers.enter_context(Server(given, log, timeout=job.startup_timeout, console=console)))
            urls[name] = started[-1].url
        try:
            with redirect_stdout(sys.stderr):  # where vLLM's loggers, imported here, print to
                targets, loads, measured = asyncio.run(_measure(job, urls, console))
        except ArcticError as error:
            raise next(filter(None, (server.ended() for server in started)), error) from error
        died = next(filter(None, (server.ended() for server in started)), None)
    result = report.describe(job.benchmark, job.command, targets, loads, measured, seed=job.seed, rounds=job.rounds)
    if job.out is not None:
        _write(result, measured, job.out, logs)
    if logs is not None and died is None:
        shutil.rmtree(logs)
    if job.as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        report.show(result, Console())
        if job.out is not None:
            click.echo(f"report: {job.out / 'report.html'}")
    if died is not None:
        raise died
    report.check_failures(measured)


async def _measure(job: Job, urls: Mapping[str, str], console: Console) -> tuple[list[Target], list[Load], Measured]:
    targets = []
    for name, url in urls.items():
        given = job.targets[name]
        target = await connect(name, url, model=job.model, tokenizer=job.tokenizer, started=not isinstance(given, str))
        if not isinstance(given, str):
            target = replace(target, about={**target.about, "arguments": redacted(given)})
        targets.append(target)
    loads = list(job.loads)
    for target in targets:
        if target.limit is not None:
            loads = [fit(load, target.limit, clip=job.clip) for load in loads]
    with _progress(console) as bar:
        task = bar.add_task("")
        measured = await measure_all(
            targets,
            loads,
            rounds=job.rounds,
            seed=job.seed,
            sampling=Sampling(job.ignore_eos, job.extra_body, job.timeout),
            begin=lambda text, total: bar.reset(task, description=text, total=total),
            advance=lambda: bar.advance(task),
        )
    return targets, loads, measured


def _progress(console: Console) -> Progress:
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    return Progress(TextColumn("{task.description}", markup=False), *columns, console=console, transient=True)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM raise an exception in the block, so that servers are stopped."""

    def end(number: int, _: Any) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(result: Mapping[str, Any], measured: Measured, out: Path, logs: Path | None) -> None:
    from arctic_plugins_vllm.bench.page import write_report

    (out / "result.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with (out / "requests.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in report.request_lines(measured))
    for log in logs.iterdir() if logs is not None else ():
        shutil.copyfile(log, out / log.name)
    write_report(result, measured, out / "report.html")
