"""``arctic train --dry-run``: report what a recipe would do, without reading any weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table
from trl import pack_dataset

from arctic_plugins.claims import compress_names, matches
from arctic_plugins.compute import dtype_name
from arctic_plugins.frozen import Codec
from arctic_plugins.processes import world_size
from arctic_plugins_huggingface.loading.weights import split_weight
from arctic_plugins_huggingface.training.memory import plan_memory
from arctic_plugins_huggingface.training.preparation import Run

__all__ = ["ModuleGroup", "RunPlan", "make_plan", "show_plan"]


@dataclass(frozen=True)
class ModuleGroup:
    """A group of weights with the same properties."""

    pattern: str
    layers: tuple[int, ...]
    """The numbers that the first ``*`` of ``pattern`` matches, or the first number in it; empty if it has neither."""
    count: int
    shape: tuple[int, ...]
    """Shape of each weight: ``(N, K)`` or ``(experts, N, K)``."""
    codec: str | None
    placement: str | None
    adapter_parameters: int
    """Trainable parameters added to each weight."""
    nbytes: int
    """Bytes of all the weights together, encoded."""
    resident_nbytes: int
    """Bytes of these that stay on the compute device, in one process."""


@dataclass(frozen=True)
class RunPlan:
    """What a recipe would do; bytes are computed from shapes, not measured."""

    settings: list[dict[str, Any]]
    """Plugin, key, value and source of each option, in the order in which the plugins act."""
    modules: list[ModuleGroup]
    parameters: int
    trainable_parameters: int
    steps: int
    rows: int
    """Rows that the Trainer sees, after truncation and packing; 0 for a stream."""
    data: str
    compute: str
    """The compute dtype, and the reason if it is not the checkpoint's."""
    warnings: list[str]
    """Warnings from the plugins."""
    trainer: list[str]
    """Mixins that the plugins add to the Trainer's class, as ``"module:attribute"``, the innermost first."""
    bytes: dict[str, int]
    """Bytes on the compute device, in one process, without activations.

    The keys are ``base``, ``trainable``, ``gradients`` and, for the AdamW family, ``optimizer``.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the plan with JSON types only."""
        return asdict(self)


def make_plan(run: Run) -> RunPlan:
    """Transform the model with the stack, without data, and count parameters and bytes."""
    stack, weights = run.stack, run.model.weights
    specs, codecs = weights.specs, weights.codecs
    model = run.model.skeleton
    plain = {name: model.get_parameter(".".join(split_weight(name, spec))).nbytes for name, spec in specs.items()}
    transformed, sizes = plan_memory(run.model, str(run.arguments.optim))
    trainable = {name: parameter for name, parameter in transformed.named_parameters() if parameter.requires_grad}
    added: dict[str, int] = defaultdict(int)
    for name, parameter in trainable.items():
        if owner := next(
            (
                module
                for module in specs
                if f".{module}." in f".{name}" and not f".{name}".endswith(f".{module}.weight")
            ),
            None,
        ):
            added[owner] += parameter.numel()

    def describe(name: str) -> tuple[tuple[int, ...], str | None, str | None, int]:
        codec: Codec | None = codecs.get(name)
        placement = weights.placements.get(name)
        return (
            specs[name].shape,
            None if codec is None else codec.describe(),
            None if placement is None else placement.describe(),
            added.get(name, 0),
        )

    kinds: dict[Any, str] = {}
    owners = {name: kinds.setdefault(describe(name), str(len(kinds))) for name in specs}
    modules = []
    for pattern in compress_names(owners, specs):
        members = [name for name in specs if matches(pattern, name)]
        size = sum(codecs[name].nbytes(specs[name].shape) if name in codecs else plain[name] for name in members)
        resident = sum(weights.resident.get(name, plain[name]) for name in members)
        modules.append(ModuleGroup(pattern, _layers(members), len(members), *describe(members[0]), size, resident))
    rows = _trainer_rows(run)
    computes = torch.bfloat16 if run.arguments.bf16 else run.model.dtype
    return RunPlan(
        settings=[
            {**asdict(setting), "value": getattr(setting.value, "value", setting.value)} for setting in stack.settings()
        ],
        modules=modules,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable_parameters=sum(parameter.numel() for parameter in trainable.values()),
        steps=_steps(run, rows),
        rows=rows,
        data=str(run.data.counts) if rows else "read while training",
        compute=run.model.dtype_reason or f"computing in {dtype_name(computes)}",
        warnings=list(run.model.warnings),
        trainer=[target for target, _ in stack.trainer_mixins()],
        bytes=sizes,
    )


def _layers(names: Iterable[str]) -> tuple[int, ...]:
    found = {next((int(part) for part in name.split(".") if part.isdigit()), None) for name in names}
    return tuple(sorted(layer for layer in found if layer is not None))


def _trainer_rows(run: Run) -> int:
    if not isinstance(run.data.train, Dataset):
        return 0
    if not run.recipe.data.packing:
        return len(run.data.train)
    strategy = run.arguments.packing_strategy  # type: ignore[attr-defined]  # of SFTConfig, as only SFT packs rows
    return len(pack_dataset(run.data.train, run.recipe.data.max_length, strategy))


def _steps(run: Run, rows: int) -> int:
    """Count steps as ``Trainer.set_initial_training_values`` does (transformers 5.19.0)."""
    arguments = run.arguments
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    readers = world_size() // math.prod(plugin.row_processes for plugin in run.stack)
    batches = rows / (arguments.per_device_train_batch_size * readers)
    batches = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    updates = max(
        1, batches // arguments.gradient_accumulation_steps + int(batches % arguments.gradient_accumulation_steps > 0)
    )
    return math.ceil(arguments.num_train_epochs * updates)


def show_plan(plan: RunPlan, console: Console) -> None:
    """Print ``plan`` within 80 columns; the tables of modules show only what is not the same for all of them."""
    settings = Table("plugin", "option", "value", "set by", title="stack, in the order in which it acts", **_LOOK)
    for row in plan.settings:
        settings.add_row(row["plugin"], row["key"], escape(str(row["value"])), row["source"])
    console.print(settings)
    for part in _modules_tables(plan.modules):
        console.print(part)
    share = 100 * plan.trainable_parameters / max(1, plan.parameters)
    sizes = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in plan.bytes.items())
    figures = Table.grid(padding=(0, 2))
    figures.add_column()
    figures.add_column(overflow="fold")
    figures.add_row("parameters", f"{plan.parameters:,}, trainable {plan.trainable_parameters:,} ({share:.2f} %)")
    figures.add_row("data", escape(plan.data))
    figures.add_row("dtype", plan.compute)
    figures.add_row(
        "steps",
        f"{plan.steps:,} over " + (f"{plan.rows:,} rows after truncation and packing" if plan.rows else "a stream"),
    )
    figures.add_row("memory", f"{sizes} (computed, without activations)")
    if plan.trainer:
        figures.add_row("trainer", "with " + ", ".join(target.partition(":")[2] for target in plan.trainer))
    for warning in plan.warnings:
        figures.add_row("warning", escape(warning))
    console.print(figures)


_LOOK: dict[str, Any] = {"box": None, "title_justify": "left", "pad_edge": False, "padding": (0, 2, 0, 0)}
_NAME_WIDTH = 20
_LAYERS_WIDTH = 14


def _modules_tables(modules: Sequence[ModuleGroup]) -> Iterator[Table | str]:
    """Yield a table for each combination of codec and placement, with one row for equal layers and no empty columns."""
    alike: dict[tuple[Any, ...], list[ModuleGroup]] = defaultdict(list)
    for module in modules:
        parts = module.pattern.split(".")
        at = next((index for index, part in enumerate(parts) if part == "*" or part.isdigit()), None)
        where = ("", module.pattern) if at is None else (".".join(parts[:at]), ".".join(parts[at + 1 :]))
        kind = f"{module.codec or 'plain'}, {module.placement}" if module.placement else module.codec or "plain"
        alike[kind, *where, module.shape, module.adapter_parameters].append(module)
    stems = sorted({stem for _, stem, *_ in alike if stem})
    yield "\nlinear modules" + (f"; layer numbers refer to {stems[0]}" if len(stems) == 1 else "")
    columns: dict[str, list[str]] = defaultdict(list)
    for (_, stem, name, shape, adapter), members in alike.items():
        layers = sorted({layer for module in members for layer in module.layers})
        count, nbytes, resident = (
            sum(found) for found in zip(*((one.count, one.nbytes, one.resident_nbytes) for one in members), strict=True)
        )
        columns["module"].append(_folded(f"{stem}.*.{name}" if stem and len(stems) > 1 else name))
        columns["layers"].append(_ranges(layers))
        columns["count"].append("" if count == max(1, len(layers)) else str(count))
        columns["N x K"].append(" x ".join(map(str, shape)))
        columns["adapter"].append(f"{adapter:,} each" if adapter else "")
        columns["MB"].append(f"{nbytes / 1e6:.2f}")
        columns["resident"].append("" if resident == nbytes else f"{resident / 1e6:.2f}")
    told = {title: cells for title, cells in columns.items() if any(cells)}
    for kind in dict.fromkeys(kind for kind, *_ in alike):
        table = Table(title=f"\n{kind}", title_style="bold", **_LOOK)
        own = [index for index, (found, *_) in enumerate(alike) if found == kind]
        shown = {
            title: cells for title, cells in told.items() if title != "resident" or any(cells[index] for index in own)
        }
        for title, cells in shown.items():
            limit = _LAYERS_WIDTH if title == "layers" else None
            width = max(len(line) for cell in [title, *cells] for line in cell.splitlines())
            justify: JustifyMethod = "right" if title in ("MB", "resident") else "left"
            table.add_column(
                title, min_width=min(width, limit or width), max_width=limit, no_wrap=limit is None, justify=justify
            )
        for index in own:
            table.add_row(*(escape(cells[index]) for cells in shown.values()))
        yield table
    yield ""


def _folded(name: str) -> str:
    """Break a dotted ``name`` into lines of at most 20 characters, unless one of its parts is longer."""
    lines, last = [], ""
    for part in name.split("."):
        if last and len(last) + len(part) > _NAME_WIDTH:
            lines.append(last)
            last = ""
        last += f"{part}."
    return "\n".join([*lines, last.removesuffix(".")])


def _ranges(numbers: Sequence[int]) -> str:
    """Return ``0-3, 7, 9-29``, or ``0-28 step 4`` for regularly spaced numbers."""
    steps = {second - first for first, second in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}-{numbers[-1]} step {steps.pop()}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
