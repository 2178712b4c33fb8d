"""Training a model whose experts are spread over processes (slot ``experts_dispatch``) with the ordinary Trainer. Read
in transformers 5.19.0.

What all processes have is averaged over all; experts are averaged over the processes that have the same ones. The
Trainer's methods are overridden for the norm that gradients are clipped by, which is that of the whole model, for
saving, and for resuming.
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
    """The mixin that lets ``trainer`` train a model whose experts are spread, gradients averaged by DDP.

    Raises:
        ConfigError: the trainer uses FSDP.
    """
    if trainer.is_fsdp_enabled:
        assert trainer.model is not None  # Trainer.__init__ sees to it
        _, dispatch = next(iter(local_parameters(trainer.model).values()))
        raise ConfigError(
            "training uses FSDP, which averages experts over all processes",
            expected="DDP, which 'arctic train --nproc' and torchrun use, or training.deepspeed",
            fix=f"leave it out, or {dispatch.option}",
        )
    return SpreadOverDDP


class SpreadExperts(Trainer):
    """Mixin for a model whose experts are spread, however gradients are averaged: checkpoints have all experts.

    Raises:
        ConfigError: training uses fp16.
    """

    model: nn.Module
    spread: Mapping[str, tuple[nn.Parameter, ExpertsDispatch]]
    """Parameters of this process alone, by name, with what spreads them."""
    dispatch: ExpertsDispatch

    def on_attach(self, plugin: Plugin | None) -> None:
        if self.args.fp16:
            raise ConfigError(
                "training uses fp16, whose loss every process would scale by itself: experts have different gradients",
                expected="bf16",
                fix="set bf16: true",
            )
        self.spread = local_parameters(self.model)
        self.dispatch = next(iter(self.spread.values()))[1]
        self.dispatch.attached = True

    @property
    def trained_experts(self) -> dict[str, nn.Parameter]:
        """Those of :attr:`spread` that are trained."""
        return {name: parameter for name, (parameter, _) in self.spread.items() if parameter.requires_grad}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Collective: a checkpoint has all experts, under the names of any other checkpoint of the model."""
        directory = Path(output_dir or str(self.args.output_dir))
        with whole_weights(
            self.model, directory / "gathered", only_trainable=isinstance(self.model, PeftModel)
        ) as whole:
            if self.args.should_save:
                self._save(str(directory), state_dict={**self.model.state_dict(), **whole})
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


class SpreadOverDDP(SpreadExperts):
    """DDP averages what it knows of; gradients of experts are averaged, and all are clipped, at the end of a step."""

    shared: list[nn.Parameter]
    """Parameters that are trained and that all processes have."""

    def on_attach(self, plugin: Plugin | None) -> None:
        super().on_attach(plugin)
        self.model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]  # DDP's, and no Tensor or Module
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
                "training changes nothing but experts, and DDP wants something that all processes have",
                expected="a parameter of every process that is trained, an adapter of attention for instance",
                fix=f"add one, or leave {self.dispatch.option} out",
            )
        self.add_callback(_SavesExperts(self))

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._clip_experts(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> Any:
        return self._clip_experts(float("inf")) if grad_norm is None else grad_norm

    @torch.no_grad()
    def _clip_experts(self, max_norm: float) -> Tensor:
        """Average the experts' gradients, clip all to ``max_norm``, and return the norm from before, which is that of
        the whole model.

        A process's experts have the gradients of the losses of all processes of their copy; DDP's losses are averaged
        over all processes.
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
        own = own.to(self.args.device)  # without trained experts it is on no gradient's device
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
        """The first process's file has its own experts only."""
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
                f"{checkpoint} has no {path.name} (of these it has {found})",
                expected="as many processes for one copy of the experts as when it was saved",
                fix=f"set {self.dispatch.option} as it was then",
            )
        content: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content


class _SavesExperts(TrainerCallback):
    """Every process of the first copy writes its experts and their optimizer state beside the checkpoint of all."""

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
