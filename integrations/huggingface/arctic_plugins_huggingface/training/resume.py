"""``arctic train --resume``: record the recipe in every checkpoint, and check which changes to it a run allows.

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
    from arctic_plugins_huggingface.training.preparation import Run
    from arctic_plugins_huggingface.training.recipe import DataConfig

__all__ = ["RECIPE", "RecipeRecord", "recorded", "resume_from"]

RECIPE = "recipe.json"
"""File in a checkpoint with the recipe that the checkpoint was made with."""
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
"""Training arguments that do not change the numbers of a training run."""
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
"""Training arguments that do not either, unless the schedule or the choice of the best model depends on evaluations."""
BATCH = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps", "processes")
"""Values whose product is the batch size of a step."""
STEPS = ("training.max_steps", "training.num_train_epochs")
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules whose rate at a step does not depend on the number of steps, unless their warmup does."""
_UNRECORDED = frozenset(
    {
        "training.hub_token",
        "training.max_length",
        "training.packing",
        "load.token",
        "load.use_auth_token",
        "load.proxies",
        "load.trust_remote_code",
    }
)
"""Secrets, a permission that holds for one run, and arguments that ``data`` sets."""
_MODEL_FILES = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")
_SAMPLES, _SAMPLE = 256, 1 << 14
_ABSENT = object()


class RecipeRecord(TrainerCallback):
    """Callback that writes the recipe into every checkpoint.

    Add it to the Trainer before calling ``attach``, whose callback marks checkpoints as complete.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(
            args, state.max_steps
        )  # a resumed Trainer takes the intervals of logs, saves and evaluations from its checkpoint

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        directory = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and directory.is_dir():
            (directory / RECIPE).write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")


def recorded(run: Run) -> dict[str, Any]:
    """Return the content of ``recipe.json``.

    ``values`` contains all values of the run, by their names in the recipe; ``given`` lists those that were set
    explicitly. Files are recorded with size and digest. The digest of a model's weights covers samples, 4 MB of each
    file.
    """
    recipe, arguments = run.recipe, run.arguments
    training = {field.name: getattr(arguments, field.name) for field in fields(arguments) if field.init}
    if isinstance(training["deepspeed"], str) and Path(training["deepspeed"]).is_file():
        training["deepspeed"] = read_json(Path(training["deepspeed"]))
    sections = {
        "plugins": run.stack.to_dict(),
        "load": recipe.load,
        "data": _data(recipe.data),
        "training": {**training, "trainer": recipe.trainer},
    }
    values = {f"{section}.{key}": value for section, options in sections.items() for key, value in options.items()}
    values |= {
        "model": _model(recipe.model),
        **({} if recipe.task is None else {"task": recipe.task}),
        "nonfinite": recipe.nonfinite,
        "processes": arguments.world_size * max(1, arguments.n_gpu),
    }
    given = {
        "plugins": recipe.plugins,
        "load": recipe.load,
        "data": {*_data(recipe.data, given=True)},
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


def _data(config: DataConfig, *, given: bool = False) -> dict[str, Any]:
    """Return the values of ``data``, or those that were set explicitly; those of a source as ``sources[0].path``."""
    values = config.model_dump(exclude={"sources"}, exclude_unset=given)
    for at, source in enumerate(config.sources or ()):
        own = source.model_dump(exclude_unset=given)
        values |= {f"sources[{at}].{key}": value for key, value in own.items()}
    named = ("path", "eval_path", "chat_template")
    files = [key for key in values if key.rpartition(".")[2] in named and not given]
    return values | {key: _data_file(values[key]) for key in files}


def _data_file(path: str | None) -> Any:
    """Return the record of a file, with the digest of its content, or ``path`` if it is not a file."""
    if path is None or not Path(path).is_file():
        return path
    file = Path(path).resolve()
    size = file.stat().st_size
    return {"path": str(file), "kind": file.suffix, "bytes": size, "xxh3_128": digest(file, size)}


def _model(model: str) -> Any:
    """Return the record of a directory, with the digest of its content, or the Hub id."""
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
    """Return the newest complete checkpoint in ``output``, after checking that ``run`` can continue from it exactly.

    Args:
        run: the run to continue.
        output: its directory.
        record: the record of ``run``, from :func:`recorded`.
        console: where to report checkpoints that were skipped, and differences from the checkpoint's recipe with which
            the run can continue.

    Returns:
        None if there is no complete checkpoint.

    Raises:
        ConfigError: if the checkpoint was made with other plugins, or with a recipe that differs in something that
            cannot change during a run.
        CheckpointError: if the checkpoint lacks something that is needed, or its ``recipe.json`` is invalid.
    """
    start, ignored = last_checkpoint(output)
    for line in ignored:
        console.print(f"ignored: {line}", highlight=False, soft_wrap=True)
    if start is None:
        console.print(
            f"{output} has no complete checkpoint: training starts from the beginning", highlight=False, soft_wrap=True
        )
        return None
    # Where weights are kept does not change the numbers: a run may continue with another placement, or on a different
    # number of machines.
    before, after = recorded_stack(start).without("placement"), run.stack.without("placement")
    if before.sha256() != after.sha256():
        found = (
            f"{start} was made with different plugins or options than the recipe's: "
            f"{', '.join(_different(before.to_dict(), after.to_dict()))}"
        )
        raise ConfigError(
            found, expected="the same", fix="set the recipe's plugins to those in its arctic_plugins.json"
        )
    _check_state(run, start)
    if not (start / RECIPE).is_file():
        line = f"warning: {start} has no {RECIPE} because an earlier version made it, so the recipe cannot be compared"
    else:
        line = _compare(start, _read(start / RECIPE), record)
    if line:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return start


def _check_state(run: Run, start: Path) -> None:
    """Raise an error if the optimizer state is missing, or needs a different number of processes."""
    known = engines()
    used = next((name for name in known if getattr(run.arguments, name, None)), "")
    engine = known.get(used)
    if engine is None and run.arguments.deepspeed:
        return  # only its plugin knows its files
    if not (start / (state := engine.state_file if engine else "optimizer.pt")).is_file():
        if engine and (start / "optimizer.pt").is_file():
            raise ConfigError(f"{start} was made without {engine.title}", fix=f"set training.{used} to its value then")
        for name, other in known.items():
            if (start / other.state_file).is_file():
                raise ConfigError(f"{start} was made with {other.title}", fix=f"set training.{name} to its value then")
        raise CheckpointError(
            f"{start} has no {state}", expected="a checkpoint saved without training.save_only_model", fix="start over"
        )
    if engine and (found := engine.processes(start)) not in (None, run.arguments.world_size):
        raise ConfigError(
            f"{start} was made by {found} processes, but this run has {run.arguments.world_size}",
            expected=f"the same number, with {engine.title}",
            fix=f"--nproc {found}",
        )


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a ``recipe.json``, which may come from a stranger."""
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
            fix="copy the checkpoint again, or start over",
        )
    return content


def _compare(start: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return a line that lists what differs from the checkpoint's recipe and takes effect in a run that continues.

    The line is empty if nothing differs.

    Raises:
        ConfigError: if there are differences with which the run would not be the same; the message lists all of them.
    """
    was, now, given = old["values"], new["values"], {*old["given"], *new["given"]}
    refused, taken = [], []
    for key in sorted(was.keys() | now.keys()):
        before, after = was.get(key, _ABSENT), now.get(key, _ABSENT)
        # Another version of the libraries may have different arguments; one that was never set has its default in both.
        if _same(before, after) or ((before is _ABSENT or after is _ABSENT) and key not in given):
            continue
        why = _why_not(key, was, now)
        if why is not None:
            refused.append(
                f"{_shown(key)[1:-1]} was {_shown(before)} and is {_shown(after)}{f' ({why})' if why else ''}"
            )
        elif key in given or "." not in key:  # the others depend on the machine
            taken.append(f"{_shown(key)[1:-1]} {_shown(after)} (was {_shown(before)})")
    if refused:
        raise ConfigError(
            f"{start} was made with a different recipe: {', '.join(refused)}",
            expected="the same",
            fix="restore the old values in the recipe, or start a new run in another output_dir",
        )
    if any(key in was and not _same(was[key], now[key]) for key in STEPS):
        _check_not_past(start, now)
    return f"{start} was made with a different recipe; from here on: {', '.join(taken)}" if taken else ""


def _different(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the differences between two stacks: plugins, and options of plugins that are in both."""
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was is None or now is None:
            yield f"plugins.{name} was {_shown(was)} and is {_shown(now)}"
            continue
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key):
                yield f"plugins.{name}.{key} was {_shown(was.get(key))} and is {_shown(now.get(key))}"


def _same(before: Any, after: Any) -> bool:
    """Return whether two values are the same; files are the same if their contents are, wherever they are."""
    if all(isinstance(value, dict) and "xxh3_128" in value for value in (before, after)):
        before, after = ({**value, "path": None} for value in (before, after))
    return bool(before == after)


def _why_not(key: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return None if a run can continue with another value of ``key``, otherwise the reason why it cannot.

    The reason is an empty string where it is obvious.
    """
    section, _, name = key.rpartition(".")
    schedule, best = now["training.lr_scheduler_type"], now["training.load_best_model_at_end"]
    by_evaluation = best or schedule in ("reduce_on_plateau", "greedy")
    if key in BATCH:
        return None if _same_batches(was, now) else "their product is the batch size of a step"
    if key in STEPS:
        return None if _steps(was) == _steps(now) else _why_not_longer(now)
    if (section == "training" and name in EVALUATION) or key in ("data.eval_path", "data.eval_split"):
        return "the schedule or the choice of the best model depends on evaluations" if by_evaluation else None
    if key == "training.dataloader_num_workers":
        return "it changes the order of a stream" if now["data.streaming"] else None
    if key in ("training.gradient_checkpointing", "training.gradient_checkpointing_kwargs"):
        options = [values.get("training.gradient_checkpointing_kwargs") or {} for values in (was, now)]
        exact = all(isinstance(values, dict) and values.keys() <= {"use_reentrant"} for values in options)
        return None if exact else "gradient_checkpointing_kwargs may change the numbers"
    # Plugins were compared by their stacks; only placements are left.
    free = (
        (section == "training" and name in FREE)
        or section == "plugins"
        or key in ("nonfinite", "load.cache_dir", "load.local_files_only")
    )
    return None if free else ""


def _same_batches(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether every step sees the same rows as before."""
    before, after = ([values[key] for key in BATCH] for values in (was, now))
    ordered = (
        now["training.train_sampling_strategy"] in ("random", "sequential") and not now["training.dataloader_drop_last"]
    )
    split = (now["training.accelerator_config"] or {}).get("split_batches")
    return before[0] * before[1] * before[2] == after[0] * after[1] * after[2] and ordered and not split


def _steps(values: Mapping[str, Any]) -> tuple[str, float]:
    """Return the option that ends a run, steps or epochs, and its value."""
    key = STEPS[0] if values[STEPS[0]] > 0 else STEPS[1]
    return key, values[key]


def _why_not_longer(now: Mapping[str, Any]) -> str | None:
    """Return None if a different end of the run changes nothing before it, otherwise the reason why it does."""
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
            f"{start} is past the end of the run: {key} is {end}", expected=f"at least {done!r}", fix="raise it"
        )


def _shown(value: Any) -> str:
    if value is _ABSENT or value is None:
        return "not set"
    if isinstance(value, dict) and "xxh3_128" in value:
        return f"{_shown(value.get('path'))} ({value.get('bytes')!r} bytes, xxh3 {str(value['xxh3_128'])[:8]!r})"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
