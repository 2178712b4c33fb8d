"""``arctic train --resume``: the recipe that a checkpoint was made with, and the changes of it with which a run can go
on.

Read in transformers 5.19.0 and trl 1.16.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.files import read_json
from arctic_plugins.provenance import digest
from arctic_plugins.recorded import recorded_stack
from arctic_plugins_huggingface.files.check import is_directory
from arctic_plugins_huggingface.training.engines import engines
from arctic_plugins_huggingface.training.trainer import last_checkpoint

if TYPE_CHECKING:
    from arctic_plugins_huggingface.training.prepare import Run

__all__ = ["RECIPE", "RecipeRecord", "recorded", "resume_from"]

RECIPE = "recipe.json"
"""File of a checkpoint with the recipe that it was made with."""
FORMAT = 1

FREE = frozenset(
    (
        *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "skip_memory_metrics"),
        *("log_level", "log_level_replica", "log_on_each_node"),
        *(
            "logging_strategy",
            "logging_steps",
            "logging_first_step",
            "logging_nan_inf_filter",
            "include_num_input_tokens_seen",
        ),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("save_total_limit", "save_only_model", "save_on_each_node", "enable_jit_checkpoint"),
        *("push_to_hub", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        *(
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
        ),
        *(
            "ddp_find_unused_parameters",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "ddp_static_graph",
            "ddp_backend",
            "ddp_timeout",
        ),
        *(
            "use_cpu",
            "torch_empty_cache_steps",
            "do_train",
            "do_eval",
            "do_predict",
            "resume_from_checkpoint",
            "local_rank",
        ),
    )
)
"""Training arguments that change no number of the training."""
EVALUATION = frozenset(
    (
        *(
            "eval_strategy",
            "eval_steps",
            "eval_delay",
            "eval_on_start",
            "eval_accumulation_steps",
            "per_device_eval_batch_size",
        ),
        *(
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "prediction_loss_only",
            "include_for_metrics",
            "batch_eval_metrics",
        ),
        *("save_strategy", "save_steps"),
    )
)
"""Those that change none, unless the schedule or the choice of the best model goes by evaluations."""
BATCH = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps", "processes")
"""Whose product is what a step sees."""
STEPS = ("training.max_steps", "training.num_train_epochs")
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules whose rate at a step does not depend on how many there are, unless their warmup does."""
_UNRECORDED = frozenset(
    {
        "training.hub_token",
        "training.max_length",
        "training.packing",
        "load.token",
        "load.use_auth_token",
        "load.proxies",
    }
)
"""Secrets, and what ``data`` says."""
_MODEL_FILES = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")
_SAMPLES, _SAMPLE = 256, 1 << 14
_ABSENT = object()


class RecipeRecord(TrainerCallback):
    """Writes the recipe into every checkpoint; give it to the Trainer before ``attach``, whose callback marks
    checkpoints as complete.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(
            args, state.max_steps
        )  # a resumed Trainer has those between logs, saves and evaluations from its checkpoint

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        directory = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and directory.is_dir():
            (directory / RECIPE).write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")


def recorded(run: Run) -> dict[str, Any]:
    """What ``recipe.json`` says: every ``values`` of the run, by its name in the recipe, and which of them were
    ``given``.

    Files are there with size and digest. Of a model's weights the digest is of samples, 4 MB of each file.
    """
    recipe, arguments = run.recipe, run.arguments
    training = {field.name: getattr(arguments, field.name) for field in fields(arguments) if field.init}
    if isinstance(training["deepspeed"], str) and Path(training["deepspeed"]).is_file():
        training["deepspeed"] = read_json(Path(training["deepspeed"]))
    sections = {
        "plugins": run.stack.to_dict(),
        "load": recipe.load,
        "data": {
            **recipe.data.model_dump(),
            **{key: _data_file(getattr(recipe.data, key)) for key in ("path", "eval_path")},
        },
        "training": training,
    }
    values = {f"{section}.{key}": value for section, options in sections.items() for key, value in options.items()}
    values |= {
        "model": _model(recipe.model),
        "nonfinite": recipe.nonfinite,
        "processes": arguments.world_size * max(1, arguments.n_gpu),
    }
    given = {
        "plugins": recipe.plugins,
        "load": recipe.load,
        "data": recipe.data.model_fields_set,
        "training": recipe.training,
    }
    record = {
        "format": FORMAT,
        "given": sorted(
            f"{section}.{key}"
            for section, keys in given.items()
            for key in keys
            if f"{section}.{key}" not in _UNRECORDED
        ),
        "values": {key: value for key, value in values.items() if key not in _UNRECORDED},
    }
    plain: dict[str, Any] = json.loads(
        json.dumps(record, default=lambda value: value.to_dict() if hasattr(value, "to_dict") else str(value))
    )
    return plain


def _data_file(path: str | None) -> Any:
    """A file with its content, or what else ``path`` is."""
    if path is None or not Path(path).is_file():
        return path
    file = Path(path).resolve()
    size = file.stat().st_size
    return {"path": str(file), "kind": file.suffix, "bytes": size, "xxh3_128": digest(file, size)}


def _model(model: str) -> Any:
    """A directory with its content, or a hub id."""
    if not is_directory(model):
        return model
    found, total = xxhash.xxh3_128(), 0
    for path in sorted(Path(model).iterdir()):
        if path.suffix in _MODEL_FILES and path.is_file():
            size = path.stat().st_size
            found.update(f"{path.name} {size}".encode())
            total += size
            with path.open("rb") as file:
                for number in range(_SAMPLES):
                    file.seek(max(number * _SAMPLE, number * size // _SAMPLES))
                    found.update(file.read(_SAMPLE))
    return {"path": str(Path(model).resolve()), "bytes": total, "xxh3_128": found.hexdigest()}


def resume_from(run: Run, output: Path, record: Mapping[str, Any], console: Console) -> Path | None:
    """The newest complete checkpoint in ``output``, with which the run can go on exactly; None if there is none.

    Args:
        run: what is to go on.
        output: its directory.
        record: of ``run``, from :func:`recorded`.
        console: where to say what was passed over, and what differs from the recipe of the checkpoint and changes no
            number.

    Raises:
        ConfigError: the checkpoint was made with other plugins, or with a recipe that differs in what cannot be changed
            on the way.
        CheckpointError: it lacks what is needed, or its ``recipe.json`` is not one.
    """
    start, ignored = last_checkpoint(output)
    for line in ignored:
        console.print(f"ignored: {line}", highlight=False, soft_wrap=True)
    if start is None:
        console.print(
            f"{output} has no complete checkpoint: training starts from the beginning", highlight=False, soft_wrap=True
        )
        return None
    # Where weights are kept changes no number: a run may go on with another placement, or on another number of
    # machines.
    before, after = recorded_stack(start).without("placement"), run.stack.without("placement")
    if before.sha256() != after.sha256():
        found = (
            f"{start} was made with other plugins or options than the recipe's: "
            f"{', '.join(_different(before.to_dict(), after.to_dict()))}"
        )
        raise ConfigError(found, expected="the same", fix="give the recipe those of its arctic_plugins.json")
    _check_state(run, start)
    if not (start / RECIPE).is_file():
        line = (
            f"warning: {start} has no {RECIPE}, an earlier version made it: whether the recipe is still the same "
            "cannot be told"
        )
    else:
        line = _compare(start, _read(start / RECIPE), record)
    if line:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return start


def _check_state(run: Run, start: Path) -> None:
    """Raise if the state of the optimizer is not there, or not for this number of processes."""
    known = engines()
    used = next((name for name in known if getattr(run.arguments, name, None)), "")
    engine = known.get(used)
    if engine is None and run.arguments.deepspeed:
        return  # only its plugin knows its files
    if not (start / (state := engine.state_file if engine else "optimizer.pt")).is_file():
        if engine and (start / "optimizer.pt").is_file():
            raise ConfigError(f"{start} was made without {engine.title}", fix=f"set training.{used} as it was then")
        for name, other in known.items():
            if (start / other.state_file).is_file():
                raise ConfigError(f"{start} was made with {other.title}", fix=f"set training.{name} as it was then")
        raise CheckpointError(
            f"{start} has no {state}", expected="a checkpoint saved without training.save_only_model", fix="start anew"
        )
    if engine and (found := engine.processes(start)) not in (None, run.arguments.world_size):
        raise ConfigError(
            f"{start} was made by {found} processes, and this run has {run.arguments.world_size}",
            expected=f"the same number, with {engine.title}",
            fix=f"--nproc {found}",
        )


def _read(path: Path) -> dict[str, Any]:
    """The content of a ``recipe.json``, which may be a stranger's."""
    content = read_json(path)
    number, values, given = content.get("format"), content.get("values"), content.get("given")
    if type(number) is int and number > FORMAT:
        raise CheckpointError(f"{path} has format {number}", expected=f"at most {FORMAT}", fix="upgrade arctic-plugins")
    numbers = (*BATCH, *STEPS)
    if (
        number != FORMAT
        or not isinstance(values, dict)
        or not isinstance(given, list)
        or not all(isinstance(key, str) for key in given)
        or not all(isinstance(values.get(key), (int, float)) for key in numbers)
    ):
        expected = f"format {FORMAT}, 'given' with names and 'values' with the numbers {', '.join(numbers)}"
        raise CheckpointError(
            f"{path} is not the recipe of a checkpoint",
            expected=expected,
            fix="copy the checkpoint again, or start anew",
        )
    return content


def _compare(start: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What a run that goes on from ``start`` takes from its recipe in place of the checkpoint's, as a line; empty, if
    nothing differs.

    Raises:
        ConfigError: lists everything that differs and would make another run.
    """
    was, now, given = old["values"], new["values"], {*old["given"], *new["given"]}
    refused, taken = [], []
    for key in sorted(was.keys() | now.keys()):
        before, after = was.get(key, _ABSENT), now.get(key, _ABSENT)
        # Another version of the libraries may have other arguments: one that was never set has its default in both.
        if _same(before, after) or ((before is _ABSENT or after is _ABSENT) and key not in given):
            continue
        why = _why_not(key, was, now)
        if why is not None:
            refused.append(
                f"{_shown(key)[1:-1]} was {_shown(before)} and is {_shown(after)}{f' ({why})' if why else ''}"
            )
        elif key in given or "." not in key:  # the others follow from the machine
            taken.append(f"{_shown(key)[1:-1]} {_shown(after)} (was {_shown(before)})")
    if refused:
        raise ConfigError(
            f"{start} was made with another recipe: {', '.join(refused)}",
            expected="the same",
            fix="give the recipe the old values, or start a new run in another output_dir",
        )
    if any(key in was and not _same(was[key], now[key]) for key in STEPS):
        _check_not_past(start, now)
    return f"{start} was made with another recipe; from here on: {', '.join(taken)}" if taken else ""


def _different(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What differs between two stacks: plugins, and options of those that are in both."""
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was is None or now is None:
            yield f"plugins.{name} was {_shown(was)} and is {_shown(now)}"
            continue
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key):
                yield f"plugins.{name}.{key} was {_shown(was.get(key))} and is {_shown(now.get(key))}"


def _same(before: Any, after: Any) -> bool:
    """Whether values are the same; files are, wherever they are, if their contents are."""
    if all(isinstance(value, dict) and "xxh3_128" in value for value in (before, after)):
        before, after = ({**value, "path": None} for value in (before, after))
    return bool(before == after)


def _why_not(key: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """None if a run can go on with another value of ``key``; otherwise why it cannot, or an empty text where that goes
    without saying.
    """
    section, _, name = key.rpartition(".")
    schedule, best = now["training.lr_scheduler_type"], now["training.load_best_model_at_end"]
    by_evaluation = best or schedule in ("reduce_on_plateau", "greedy")
    if key in BATCH:
        return None if _same_batches(was, now) else "their product is the batch of a step"
    if key in STEPS:
        return None if _steps(was) == _steps(now) else _why_not_longer(now)
    if (section == "training" and name in EVALUATION) or key in ("data.eval_path", "data.eval_split"):
        return "the schedule or the choice of the best model goes by evaluations" if by_evaluation else None
    if key == "training.dataloader_num_workers":
        return "it changes the order of a stream" if now["data.streaming"] else None
    if key in ("training.gradient_checkpointing", "training.gradient_checkpointing_kwargs"):
        options = [values.get("training.gradient_checkpointing_kwargs") or {} for values in (was, now)]
        exact = all(isinstance(values, dict) and values.keys() <= {"use_reentrant"} for values in options)
        return None if exact else "gradient_checkpointing_kwargs may change numbers"
    # Plugins were compared by their stacks: what is left are placements.
    free = (
        (section == "training" and name in FREE)
        or section == "plugins"
        or key in ("nonfinite", "load.cache_dir", "load.local_files_only")
    )
    return None if free else ""


def _same_batches(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether every step sees the rows that it would have seen."""
    before, after = ([values[key] for key in BATCH] for values in (was, now))
    ordered = (
        now["training.train_sampling_strategy"] in ("random", "sequential") and not now["training.dataloader_drop_last"]
    )
    split = (now["training.accelerator_config"] or {}).get("split_batches")
    return before[0] * before[1] * before[2] == after[0] * after[1] * after[2] and ordered and not split


def _steps(values: Mapping[str, Any]) -> tuple[str, float]:
    """The end of a run: after so many steps, or epochs."""
    key = STEPS[0] if values[STEPS[0]] > 0 else STEPS[1]
    return key, values[key]


def _why_not_longer(now: Mapping[str, Any]) -> str | None:
    """None if another end changes nothing of what comes before it."""
    schedule = now["training.lr_scheduler_type"]
    if schedule not in ENDLESS or "scheduler" in (now["training.deepspeed"] or {}):
        return f"the schedule '{schedule}' depends on it"
    if 0 < now["training.warmup_steps"] < 1:
        return "warmup_steps is a fraction of it"
    return "the choice of the best model may depend on it" if now["training.load_best_model_at_end"] else None


def _check_not_past(start: Path, now: Mapping[str, Any]) -> None:
    """Raise ConfigError if the run would have ended before ``start``."""
    state = read_json(start / "trainer_state.json")
    key, end = _steps(now)
    done = state.get("global_step" if key == STEPS[0] else "epoch")
    if not isinstance(done, (int, float)) or done > end:
        raise ConfigError(
            f"{start} is past the end of the recipe: {key} is {end}", expected=f"at least {done!r}", fix="raise it"
        )


def _shown(value: Any) -> str:
    if value is _ABSENT or value is None:
        return "not set"
    if isinstance(value, dict) and "xxh3_128" in value:
        return f"{_shown(value.get('path'))} ({value.get('bytes')!r} bytes, xxh3 {str(value['xxh3_128'])[:8]!r})"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
