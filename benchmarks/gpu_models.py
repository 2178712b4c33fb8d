"""Random models of any size, made on the device by the project's own loader, and training steps that are measured."""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from arctic_plugins_huggingface import ArcticTrainingArguments, ModelPlan, attach, load_model, plan_model
from arctic_plugins_huggingface.loading.names import stored_shapes
from arctic_plugins_huggingface.training.memory import plan_memory
from torch import Tensor
from transformers import AutoConfig, PrinterCallback, Trainer, TrainerCallback

from arctic_plugins import Stack
from arctic_plugins.testing import tiny_model

__all__ = ["Measured", "plan_random", "release", "share_under", "train"]


class Drawn:
    """A weight that is drawn at random, on the device, when the loader reads it as it would a file's tensor."""

    def __init__(self, shape: Sequence[int], device: str) -> None:
        self.shape, self.device = tuple(shape), device

    def __getitem__(self, where: Any) -> Tensor:
        assert where is ..., "the loader reads whole tensors (transformers 5.19.0, core_model_loading.py)"
        if len(self.shape) == 1:  # a norm
            return torch.ones(self.shape, dtype=torch.bfloat16, device=self.device)
        return torch.randn(self.shape, dtype=torch.bfloat16, device=self.device).mul_(0.02)


def plan_random(
    directory: Path, model_type: str, sizes: Mapping[str, Any], plugins: Mapping[str, Any], device: str, **kwargs: Any
) -> ModelPlan:
    """Plan a model of these sizes, whose weights are drawn one after the other while ``load_model`` loads it.

    The host never holds a weight, except what the stack places there.

    Args:
        directory: where to write its config, and a tokenizer.
        model_type: type as in ``config.json``.
        sizes: fields of the config.
        plugins: name -> options, as in a recipe.
        device: ``"cuda"`` or ``"cpu"``.
        **kwargs: further arguments of ``from_pretrained``.
    """
    if not directory.is_dir():
        tiny_model(directory, model_type)  # for the tokenizer
        (directory / "model.safetensors").unlink()
        fields = {"dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **sizes}
        AutoConfig.for_model(model_type, **fields).save_pretrained(directory)
    device = "cuda:0" if device == "cuda" else device  # the Trainer's name for it
    plan = plan_model(directory, Stack.from_dict(dict(plugins)), state_dict={}, device_map={"": device}, **kwargs)
    matrices = {
        f"{name}.weight": shape for name, shape in stored_shapes(plan.weights.specs, plan.weights.stored).items()
    }
    claimed = {f"{name}.weight" if spec.experts is None else name for name, spec in plan.weights.specs.items()}
    others = {name: value.shape for name, value in plan.skeleton.state_dict().items() if name not in claimed}
    drawn = {name: Drawn(shape, device) for name, shape in {**others, **matrices}.items()}
    return dataclasses.replace(plan, load={**plan.load, "state_dict": drawn})


@dataclasses.dataclass
class Measured:
    """What training showed; bytes are None on a CPU."""

    seconds: list[float]
    """Of each step after the first two, from its start until the device is done."""
    loading: float
    """Seconds until the model was made."""
    planned: int
    """Bytes that the plan promises after the first optimizer step: weights, adapter, gradients and optimizer."""
    held: int | None
    """Bytes of tensors after the first optimizer step, before gradients are freed."""
    peak: int | None
    """The most bytes of tensors at any time, loading included."""
    reserved: int | None
    """The same, with what the allocator keeps around them."""
    loss: float
    overlap: float | None = None
    """The share of host-to-device copies' time that lies under kernels; None if there were no copies."""

    @property
    def median(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]


class Meter(TrainerCallback):
    """Callback that times steps, and profiles the last one if asked."""

    def __init__(self, device: str, profiled: int | None) -> None:
        self.device, self.profiled = device, profiled
        self.begun = 0.0
        self.seconds: list[float] = []
        self.held: int | None = None
        self.trace: list[dict[str, Any]] = []
        self.profiler: Any = None

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait()
        if self.profiled == state.global_step:
            kinds = torch.profiler.ProfilerActivity
            self.profiler = torch.profiler.profile(activities=[kinds.CUDA if self.device == "cuda" else kinds.CPU])
            self.profiler.start()
        self.begun = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.held is None and self.device == "cuda":
            self._wait()
            self.held = torch.cuda.memory_allocated()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait()
        if self.profiler is None:
            self.seconds.append(time.perf_counter() - self.begun)
            return
        self.profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(path))
            self.trace = json.loads(path.read_text())["traceEvents"]
        self.profiler = None


def train(
    plan: ModelPlan,
    plugins: Mapping[str, Any],
    rows: int,
    tokens: int,
    *,
    steps: int,
    profile: bool = False,
    **options: Any,
) -> Measured:
    """Load the model of ``plan`` and train it with the Trainer on random tokens, ``rows`` x ``tokens`` a step.

    Args:
        plan: from :func:`plan_random`.
        plugins: the same as there.
        rows, tokens: the batch.
        steps: how many steps are timed, after two that are not.
        profile: whether to trace one more step.
        **options: further training arguments.
    """
    device = torch.device(plan.load["device_map"][""]).type
    planned = sum(plan_memory(plan, "adamw_torch_fused")[1].values())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    since = time.perf_counter()
    model, _ = load_model(plan)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    loading = time.perf_counter() - since
    total, meter = steps + 2 + profile, Meter(device, steps + 2 if profile else None)
    ids = torch.randint(5, plan.config.vocab_size, (total * rows, tokens))
    with tempfile.TemporaryDirectory() as folder:
        arguments = ArcticTrainingArguments(
            folder,
            plugins=dict(plugins),
            max_steps=total,
            per_device_train_batch_size=rows,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **options,
        )
        texts: Any = [{"input_ids": row, "labels": row} for row in ids]
        trainer = attach(Trainer(model, arguments, train_dataset=texts, callbacks=[meter]), plan.stack)
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
    cuda = device == "cuda"
    return Measured(
        meter.seconds[2:],
        loading,
        planned,
        meter.held,
        torch.cuda.max_memory_allocated() if cuda else None,
        torch.cuda.max_memory_reserved() if cuda else None,
        loss,
        share_under(meter.trace),
    )


def share_under(trace: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the share of the time of host-to-device copies during which a kernel ran; None without copies.

    Args:
        trace: events of a profiler's Chrome trace (``ts`` and ``dur`` in microseconds), of one device.
    """
    spans: dict[str, list[tuple[float, float]]] = {"kernel": [], "gpu_memcpy": []}
    for event in trace:
        if event.get("cat") in spans and (event["cat"] == "kernel" or "HtoD" in event["name"]):
            spans[event["cat"]].append((event["ts"], event["ts"] + event["dur"]))
    merged: list[list[float]] = []
    for begin, end in sorted(spans["kernel"]):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([begin, end])
    total, under, first = 0.0, 0.0, 0
    for begin, end in sorted(spans["gpu_memcpy"]):
        total += end - begin
        while first < len(merged) and merged[first][1] <= begin:
            first += 1
        for busy, done in merged[first:]:
            if busy >= end:
                break
            under += min(end, done) - max(begin, busy)
    return under / total if total else None


def release() -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
