"""Train a model whose experts are spread over processes (slot ``experts_dispatch``) with the ordinary Trainer.

Gradients of parameters that all processes have are averaged over all processes, those of experts over the processes
that have the same ones. The Trainer's methods are overridden for clipping gradients, which uses the norm of the whole
model, for saving, and for resuming. Read in transformers 5.19.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from arctic_plugins.adapter import WEIGHTS
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.frozen import ExpertsDispatch, local_parameters
from arctic_plugins.plugin import Plugin
from arctic_plugins_huggingface.checkpoints.gather import whole_weights
from arctic_plugins_huggingface.loading.restore import restore_weights

__all__ = ["SpreadExperts", "SpreadOverDDP", "experts_mixin"]


def experts_mixin(trainer: Trainer) -> type[SpreadExperts]:
    """Return the mixin with which ``trainer`` can train a model with spread experts while DDP averages the gradients.

    Raises:
        ConfigError: if the trainer uses FSDP.
    """
    if trainer.is_fsdp_enabled:
        assert trainer.model is not None  # ensured by Trainer.__init__
        _, dispatch = next(iter(local_parameters(trainer.model).values()))
        raise ConfigError(
            "training uses FSDP, which averages experts over all processes",
            expected="DDP, which 'arctic train --nproc' and torchrun use, or training.deepspeed",
            fix=f"leave out FSDP or {dispatch.option}",
        )
    return SpreadOverDDP


class SpreadExperts(Trainer):
    """Mixin for a model with spread experts, however gradients are averaged; its checkpoints contain all experts.

    Raises:
        ConfigError: if training uses fp16.
    """

    model: nn.Module
    """The model, whose experts are spread."""
    spread: Mapping[str, tuple[nn.Parameter, ExpertsDispatch]]
    """Parameters that only this process has, by name, each with the dispatch that spreads it."""
    dispatch: ExpertsDispatch
    """The dispatch of the experts; that of any of them, as they share one."""

    def on_attach(self, plugin: Plugin | None) -> None:
        """Find the spread experts of the model."""
        if self.args.fp16:
            raise ConfigError(
                "training uses fp16, where every process would scale the loss differently, as gradients of experts "
                "differ",
                expected="bf16",
                fix="set bf16: true",
            )
        self.spread = local_parameters(self.model)
        self.dispatch = next(iter(self.spread.values()))[1]
        self.dispatch.attached = True

    @property
    def trained_experts(self) -> dict[str, nn.Parameter]:
        """The parameters in :attr:`spread` that are trained."""
        return {name: parameter for name, (parameter, _) in self.spread.items() if parameter.requires_grad}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a checkpoint with all experts, under the names that any checkpoint of the model uses. Collective."""
        directory = Path(output_dir or str(self.args.output_dir))
        with whole_weights(
            self.model, directory / "gathered", only_trainable=isinstance(self.model, PeftModel)
        ) as whole:
            if self.args.should_save:
                self._save(str(directory), state_dict={**self.model.state_dict(), **whole})
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


class SpreadOverDDP(SpreadExperts):
    """Mixin for DDP, which averages only the gradients of parameters that all processes have.

    At the end of a step, the gradients of experts are averaged and all gradients are clipped.
    """

    shared: list[nn.Parameter]
    """Trained parameters that all processes have."""

    def on_attach(self, plugin: Plugin | None) -> None:
        super().on_attach(plugin)
        self.model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]  # DDP's attribute, not a Tensor or Module
            *getattr(self.model, "_ddp_params_and_buffers_to_ignore", ()),
            *self.spread,
        ]
        self.shared = [
            parameter
            for name, parameter in self.model.named_parameters()
            if name not in self.spread and parameter.requires_grad
        ]
        if not self.shared:
            raise ConfigError(
                "training changes only experts, but DDP needs a trained parameter that all processes have",
                expected="a trained parameter in every process, for example an adapter of attention",
                fix=f"add one, or leave {self.dispatch.option} out",
            )
        self.add_callback(_SavesExperts(self))

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._clip_experts(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> Any:
        return self._clip_experts(float("inf")) if grad_norm is None else grad_norm

    @torch.no_grad()
    def _clip_experts(self, max_norm: float) -> Tensor:
        """Average the experts' gradients, clip all gradients to ``max_norm``, and return the whole model's norm.

        The norm is the one before clipping. The gradients of a process's experts are sums over the losses of all
        processes that share one copy of the experts. DDP averages losses over all processes, so the sum over the copies
        is divided by the number of processes.
        """
        self.accelerator.unscale_gradients()
        trained = self.trained_experts.values()
        world = torch.distributed.get_world_size()
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.dispatch.sum_over_copies(parameter.grad)
            parameter.grad.div_(world)
        own = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None]) ** 2
        own = own.to(self.args.device)  # without trained experts, no gradient has put it on the device
        self.dispatch.sum_over_parts(own)
        rest = get_total_norm([parameter.grad for parameter in self.shared if parameter.grad is not None])
        norm = (own + rest.to(own.device) ** 2).sqrt()
        if max_norm != float("inf"):
            clip_grads_with_norm_([*trained, *self.shared], max_norm, norm)
        return norm

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = model or self.model
        saved = self._read_experts(resume_from_checkpoint)
        directory = Path(resume_from_checkpoint)
        if isinstance(model, PeftModel):
            owners = {name.rpartition(".experts.")[0] for name in self.trained_experts}
            state = load_file(directory / WEIGHTS)
            others = {name: tensor for name, tensor in state.items() if name.rpartition(".experts.")[0] not in owners}
            set_peft_model_state_dict(model, others)
        else:
            restore_weights(model, directory, skip=self.spread)
        for name, parameter in self.trained_experts.items():
            parameter.copy_(saved["parameters"][name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer state of this process's experts too: the first process's file has only its own experts."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        saved, state = self._read_experts(checkpoint)["optimizer"], self._optimizer_state()
        for name, parameter in self.trained_experts.items():
            if name in saved:
                state[parameter] = {
                    key: value.to(parameter.device) if isinstance(value, Tensor) and value.ndim else value
                    for key, value in saved[name].items()
                }

    def _experts_file(self) -> str:
        return f"experts_{self.dispatch.rank}_of_{self.dispatch.size}.pt"

    def _optimizer_state(self) -> Any:
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer).state

    def _read_experts(self, checkpoint: str | Path) -> Mapping[str, Any]:
        path = Path(checkpoint) / self._experts_file()
        if not path.is_file():
            found = ", ".join(sorted(file.name for file in Path(checkpoint).glob("experts_*_of_*.pt"))) or "none"
            raise CheckpointError(
                f"{checkpoint} has no {path.name} (files of this kind: {found})",
                expected="as many processes per copy of the experts as when it was saved",
                fix=f"set {self.dispatch.option} to the value used then",
            )
        content: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content


class _SavesExperts(TrainerCallback):
    """Callback: every process of the first copy saves its experts and their optimizer state with the checkpoint."""

    def __init__(self, trainer: SpreadOverDDP) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        if torch.distributed.get_rank() >= trainer.dispatch.size:
            return
        directory = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        directory.mkdir(parents=True, exist_ok=True)
        optimizer, trained = trainer._optimizer_state(), trainer.trained_experts
        torch.save(
            {
                "parameters": {name: parameter.detach().cpu() for name, parameter in trained.items()},
                "optimizer": {
                    name: dict(optimizer[parameter]) for name, parameter in trained.items() if parameter in optimizer
                },
            },
            directory / trainer._experts_file(),
        )
