"""``arctic train``: run a recipe with one of TRL's trainers, or on labeled data with the ordinary ``Trainer``, and save
the trained adapter. Read in trl 1.16.0.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import upload_folder
from rich.console import Console
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import has_length
from trl import SFTTrainer

from arctic_plugins.errors import ArcticError, ConfigError, Interrupted, one_line
from arctic_plugins.processes import is_first
from arctic_plugins.provenance import FILE_NAME, check_files
from arctic_plugins.stack import Stack
from arctic_plugins_huggingface.checkpoints.gather import is_adapted, is_spread
from arctic_plugins_huggingface.checkpoints.save import save_checkpoint
from arctic_plugins_huggingface.files.locking import in_use_by_us
from arctic_plugins_huggingface.files.staging import writing
from arctic_plugins_huggingface.loading.config import text_tokenizer
from arctic_plugins_huggingface.loading.load import load_model
from arctic_plugins_huggingface.training.check import check_output, check_recipe, check_trainer
from arctic_plugins_huggingface.training.labeled import label_trainer_arguments
from arctic_plugins_huggingface.training.packing import check_packing
from arctic_plugins_huggingface.training.preparation import Run, prepare
from arctic_plugins_huggingface.training.progress import TrainingProgress
from arctic_plugins_huggingface.training.recipe import Recipe
from arctic_plugins_huggingface.training.result import TrainingResult
from arctic_plugins_huggingface.training.resume import RecipeRecord, recorded, resume_from
from arctic_plugins_huggingface.training.trainer import GracefulStop, attach

__all__ = ["train"]

REFERENCE = "ref"
"""The name that TRL 1.16.0 gives to the copy of an adapter that it compares with."""


class _Repeatable(Trainer):
    """Part of every trainer here: a resumed run is the run that it continues, and evaluation changes nothing."""

    def _init_training_state(
        self, max_steps: int, updates: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Return the pass and the batch to continue with.

        For a stream, whose length is unknown, the Trainer counts as if the first pass never ended.
        """
        found: tuple[int, int] = super()._init_training_state(max_steps, updates, epochs, checkpoint, trial)
        if checkpoint is None or has_length(self.train_dataset) or self.args.ignore_data_skip:
            return found
        state = TrainerState.load_from_json(
            str(Path(checkpoint) / "trainer_state.json")
        )  # there, one epoch is as long as the whole run
        passes = max(0, math.ceil(state.epoch or 0) - 1)
        return passes, round(((state.epoch or 0) - passes) * state.max_steps) * self.args.gradient_accumulation_steps

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without changing the random states.

        A run that is resumed at the end of an epoch does not repeat the evaluation that came after the save.
        """
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            return super().evaluate(*args, **kwargs)


class _SFTTrainer(_Repeatable, SFTTrainer):
    """TRL's trainer with the model's own loss if there is no GPU.

    TRL computes the loss with a fused head, a Triton kernel on GPUs; its torch fallback took 1.4 s of a step of 4.0 s
    on two cores (SmolLM2-135M, 8 x 140 tokens). The model's own loss needs memory for the logits instead, except those
    before the first completion.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if torch.accelerator.is_available():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return Trainer.compute_loss(
            self, model, {**_only_completions(inputs), "use_cache": False}, return_outputs, num_items_in_batch
        )


def _trainer_class(run: Run) -> type[Any]:
    """Return the class of the run's trainer, whose arguments are those of TRL's trainers."""
    if run.labels is not None:
        return _Repeatable
    trainer = check_trainer(run.recipe)
    if not trainer.preference:
        return _SFTTrainer
    kind, _ = trainer.load()
    return type(kind.__name__, (_Repeatable, kind), {})


@torch.no_grad()
def _without_reference(model: torch.nn.Module) -> None:
    """Delete the copy of the adapter that TRL (DPO, KTO) makes as its reference, unless it is not the model without it.

    TRL then computes the reference with the adapter turned off. The copy would take the adapter's memory again, and
    would be saved with it. An adapter whose initialization changed the base weights (PiSSA) needs it.
    """
    if not is_adapted(model) or REFERENCE not in model.peft_config:
        return
    training, ids = model.training, torch.arange(1, 9, device=model.device)[None]
    model.eval()
    adapted = model(input_ids=ids, use_cache=False).logits
    with model.disable_adapter():
        plain = model(input_ids=ids, use_cache=False).logits
    model.train(training)
    if torch.equal(adapted, plain):
        model.delete_adapter(REFERENCE)


def _only_completions(inputs: dict[str, Any]) -> dict[str, Any]:
    """Request no logits at positions before all completions of the batch, which do not contribute to the loss."""
    labels = inputs["labels"]
    predicted = inputs.get("shift_labels", labels[:, 1:])  # the token that each position predicts
    in_loss = (predicted != -100).any(dim=0).nonzero()
    if not len(in_loss):
        return inputs
    start = int(in_loss[0])
    kept: dict[str, Any] = {name: inputs[name][:, start:] for name in ("labels", "shift_labels") if name in inputs}
    return {**inputs, **kept, "logits_to_keep": labels.shape[1] - start}


def train(
    recipe: Recipe,
    *,
    stack: Stack | None = None,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    console: Console | None = None,
) -> TrainingResult | None:
    """Run ``recipe`` and save the result in ``<output_dir>/final``.

    Args:
        recipe: the recipe to run.
        stack: what :func:`~arctic_plugins_huggingface.training.check.check_recipe` returned for it, if it was called.
        resume: continue from the newest complete checkpoint in ``output_dir``, with the losses that the run would have
            had without the interruption; start from the beginning if there is none.
        overwrite: remove the checkpoints that an earlier run left in ``output_dir``, and nothing else, just before this
            run starts.
        callbacks: additional callbacks for the Trainer.
        loaded: the model and tokenizer, if they were already loaded through the recipe's stack.
        console: where to show progress.

    Returns:
        None if there is nothing to resume because ``final`` is complete.

    Raises:
        UserError: if something is wrong with the recipe, its data or its output directory (raised before weights are
            read), or the disk is full.
        Interrupted: if SIGINT or SIGTERM arrived; the current step was finished and a checkpoint saved.
    """
    console = console or Console()
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite are mutually exclusive", fix="leave one out")
    stack = check_recipe(recipe) if stack is None else stack
    output = Path(str(recipe.training["output_dir"]))
    if resume and (output / "final" / FILE_NAME).is_file():
        check_files(output / "final")
        return None
    check_output(output, new=not resume and not overwrite)
    with in_use_by_us(output):
        return _train(prepare(recipe, stack), output, resume, overwrite, callbacks, loaded, console)


def _train(
    run: Run,
    output: Path,
    resume: bool,
    overwrite: bool,
    callbacks: list[TrainerCallback] | None,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None,
    console: Console,
) -> TrainingResult:
    """Do the work of :func:`train` in a directory ``output`` that no other run is using."""
    recipe = run.recipe
    if not recipe.data.streaming:
        held_out = f"; {len(run.data.eval):,} rows to evaluate on" if run.data.eval is not None else ""
        console.print(f"data: {run.data.counts}{held_out}", highlight=False, markup=False)
    record = recorded(run)
    start = resume_from(run, output, record, console) if resume else None
    set_seed(run.arguments.seed)  # adapters are initialized at random
    model, tokenizer = loaded or load_model(run.model)
    if recipe.data.packing:
        check_packing(model)
    if overwrite and is_first():
        for path in [*output.glob("checkpoint-*"), output / "final"]:
            shutil.rmtree(path, ignore_errors=True)
    stop, progress = GracefulStop(), TrainingProgress(console)
    text, options = text_tokenizer(tokenizer), dict[str, Any]()
    try:
        if run.labels is not None:
            options = label_trainer_arguments(model, text, run.labels)
        trainer: Any = _trainer_class(run)(
            model=model,
            args=run.arguments,
            train_dataset=run.data.train,
            eval_dataset=run.data.eval,
            processing_class=text,
            **options,
            callbacks=[*(callbacks or []), stop, progress, RecipeRecord(record)],
        )
    except (ValueError, ImportError) as error:  # combinations of arguments that only the trainers check
        raise ConfigError(
            f"training is not valid: {one_line(error)}", fix="correct the argument that it names"
        ) from error
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    _without_reference(model)
    attach(trainer, run.stack, skip_nonfinite=run.recipe.nonfinite == "skip")
    if start is not None:
        console.print(f"resuming from {start}", highlight=False)
    started = time.perf_counter()
    with writing(
        output, fix="free some space; 'arctic train RECIPE --resume' continues from the newest complete checkpoint"
    ):
        try:
            with stop.listening(), _others_answering(run.arguments):
                _run(trainer, start)
        finally:
            progress.close()
        seconds = time.perf_counter() - started
        if stop.requested and trainer.state.global_step < trainer.state.max_steps:
            step = trainer.state.global_step
            raise Interrupted(
                f"stopped after step {step} of {trainer.state.max_steps}, saved in {output}/checkpoint-{step}",
                fix="'arctic train RECIPE --resume' continues",
            )
        if trainer.is_world_process_zero() or is_spread(model):
            save_checkpoint(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run.final, run.stack)
    if run.arguments.push_to_hub and trainer.is_world_process_zero():
        trainer._finish_current_push()
        upload_folder(
            repo_id=str(trainer.hub_model_id),
            folder_path=run.final,
            commit_message="Training done",
            token=run.arguments.hub_token,
        )
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return TrainingResult(
        directory=run.final,
        history=trainer.state.log_history,
        seconds=seconds,
        steps=trainer.state.global_step,
        tokens=progress.tokens(trainer.state),
        trainable_parameters=trainable,
        counts=run.data.counts,
        model=model,
        tokenizer=tokenizer,
    )


@contextmanager
def _others_answering(arguments: TrainingArguments) -> Iterator[None]:
    """Report in one line that another process of the run hangs or has ended.

    gloo (torch 2.13) reports it with lines of its own source code.
    """
    try:
        yield
    except RuntimeError as error:
        gone, late = "Connection closed by peer" in str(error), "Timed out waiting" in str(error)
        if not gone and not late:
            raise
        found = "has ended" if gone else f"did not answer for {arguments.ddp_timeout} s (training.ddp_timeout)"
        raise ArcticError(
            f"another process of this run {found}",
            fix="check its output; 'arctic train RECIPE --resume' continues from the newest complete checkpoint",
        ) from error


def _run(trainer: Trainer, start: Path | None) -> None:
    """Call ``trainer.train``, unless no step is left: it would run one more (transformers 5.19.0, ``max_steps``)."""
    if start is not None:
        state = TrainerState.load_from_json(str(start / "trainer_state.json"))
        if 0 < trainer.args.max_steps <= state.global_step:
            trainer._load_from_checkpoint(str(start))
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
