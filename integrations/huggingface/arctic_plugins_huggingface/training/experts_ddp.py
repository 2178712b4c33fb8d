"""Training a model whose experts are spread over processes (slot ``experts_dispatch``) with the ordinary Trainer. Read
in transformers 5.19.0.

What all processes have is averaged over all; experts are averaged over the processes that have the same ones. What no
callback can reach is replaced in the trainer: the norm that gradients are clipped by, which is that of the whole model,
saving, and resuming.
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
from arctic_plugins_huggingface.checkpoints.gather import whole_weights
from arctic_plugins_huggingface.loading.restore import restore_weights

__all__ = ["SpreadExperts", "spread"]


def spread(trainer: Trainer) -> SpreadExperts:
    """What lets ``trainer`` train a model whose experts are spread. Call it before the trainer wraps the model.

    Raises:
        ConfigError: the trainer uses fp16, FSDP, or DeepSpeed with a stage that cannot.
    """
    if trainer.args.fp16:
        raise ConfigError(
            "training uses fp16, whose loss every process would scale by itself: experts have different gradients",
            expected="bf16",
            fix="set bf16: true",
        )
    if trainer.is_deepspeed_enabled:
        from arctic_plugins_huggingface.training.experts_zero import SpreadOverZero

        return SpreadOverZero(trainer)
    if trainer.is_fsdp_enabled:
        raise ConfigError(
            "training uses FSDP, which averages experts over all processes",
            expected="DDP, which 'arctic train --nproc' and torchrun use, or DeepSpeed's ZeRO 1 or 2",
            fix="leave it out, or expert_parallel",
        )
    return SpreadOverDDP(trainer)


class SpreadExperts(TrainerCallback):
    """What a trainer of such a model does otherwise, however it averages gradients: checkpoints have all experts."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.local = trainer, local_parameters(trainer.model)
        self.dispatch: ExpertsDispatch = next(iter(self.local.values()))[1]
        self.trained = {name: parameter for name, (parameter, _) in self.local.items() if parameter.requires_grad}
        self.dispatch.attached = True
        trainer.save_model = self.save

    def save(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """``Trainer.save_model``, collective: a checkpoint has all experts, under the names of any other checkpoint of
        the model.
        """
        trainer = self.trainer
        directory = Path(output_dir or str(trainer.args.output_dir))
        with whole_weights(
            trainer.model, directory / "gathered", only_trainable=isinstance(trainer.model, PeftModel)
        ) as whole:
            if trainer.args.should_save:
                trainer._save(str(directory), state_dict={**trainer.model.state_dict(), **whole})
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


class SpreadOverDDP(SpreadExperts):
    """DDP averages what it knows of; gradients of experts are averaged, and all are clipped, at the end of a step."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        trainer.model._ddp_params_and_buffers_to_ignore = [
            *getattr(trainer.model, "_ddp_params_and_buffers_to_ignore", ()),
            *self.local,
        ]
        self.rest = [
            parameter
            for name, parameter in trainer.model.named_parameters()
            if name not in self.local and parameter.requires_grad
        ]
        if not self.rest:
            raise ConfigError(
                "training changes nothing but experts, and DDP wants something that all processes have",
                expected="a parameter of every process that is trained, an adapter of attention for instance",
                fix="add one, or leave expert_parallel out",
            )
        self.load_optimizer = trainer._load_optimizer_and_scheduler
        replaced: dict[str, Any] = {
            "_clip_grad_norm": lambda _model: self.clip(trainer.args.max_grad_norm),
            "_get_grad_norm": lambda _model, grad_norm=None: (
                self.clip(float("inf")) if grad_norm is None else grad_norm
            ),
            "_load_from_checkpoint": self.resume,
            "_load_best_model": lambda: self.resume(trainer.state.best_model_checkpoint),
            "_load_optimizer_and_scheduler": self.resume_optimizer,
        }
        for name, method in replaced.items():
            setattr(trainer, name, method)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Average the experts' gradients, clip all to ``max_norm``, and return the norm from before, which is that of
        the whole model.

        A process's experts have the gradients of the losses of all processes of their copy; DDP's losses are averaged
        over all processes.
        """
        self.trainer.accelerator.unscale_gradients()
        world = torch.distributed.get_world_size()
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.dispatch.sum_over_copies(parameter.grad)
            parameter.grad.div_(world)
        own = get_total_norm([parameter.grad for parameter in self.trained.values() if parameter.grad is not None]) ** 2
        own = own.to(self.trainer.args.device)  # without trained experts it is none of a gradient's device
        self.dispatch.sum_over_parts(own)
        rest = get_total_norm([parameter.grad for parameter in self.rest if parameter.grad is not None])
        norm = (own + rest.to(own.device) ** 2).sqrt()
        if max_norm != float("inf"):
            clip_grads_with_norm_([*self.trained.values(), *self.rest], max_norm, norm)
        return norm

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every process of the first copy writes its experts and their optimizer state beside the checkpoint of all."""
        if torch.distributed.get_rank() >= self.dispatch.size:
            return
        directory = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        directory.mkdir(parents=True, exist_ok=True)
        optimizer = self._optimizer_state()
        torch.save(
            {
                "parameters": {name: parameter.detach().cpu() for name, parameter in self.trained.items()},
                "optimizer": {
                    name: dict(optimizer[parameter])
                    for name, parameter in self.trained.items()
                    if parameter in optimizer
                },
            },
            directory / self._file(),
        )

    def _file(self) -> str:
        return f"experts_{self.dispatch.rank}_of_{self.dispatch.size}.pt"

    def _optimizer_state(self) -> Any:
        optimizer: Any = self.trainer.optimizer
        return getattr(optimizer, "optimizer", optimizer).state

    def _read(self, checkpoint: str | Path) -> Mapping[str, Any]:
        path = Path(checkpoint) / self._file()
        if not path.is_file():
            found = ", ".join(sorted(file.name for file in Path(checkpoint).glob("experts_*_of_*.pt"))) or "none"
            raise CheckpointError(
                f"{checkpoint} has no {path.name} (of these it has {found})",
                expected="as many processes for one copy of the experts as when it was saved",
                fix="set plugins.moe.expert_parallel as it was then",
            )
        content: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content

    @torch.no_grad()
    def resume(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """``Trainer._load_from_checkpoint``."""
        model = model or self.trainer.model
        saved = self._read(resume_from_checkpoint)
        self._load_rest(Path(resume_from_checkpoint), model)
        for name, parameter in self.trained.items():
            parameter.copy_(saved["parameters"][name])

    def _load_rest(self, directory: Path, model: Any) -> None:
        if not isinstance(model, PeftModel):
            restore_weights(model, directory, skip=self.local)
            return
        owners = {name.rpartition(".experts.")[0] for name in self.trained}
        state = load_file(directory / WEIGHTS)
        set_peft_model_state_dict(
            model, {name: tensor for name, tensor in state.items() if name.rpartition(".experts.")[0] not in owners}
        )

    def resume_optimizer(self, checkpoint: str | None) -> None:
        """``Trainer._load_optimizer_and_scheduler``, of which the first process's file has its own experts only."""
        self.load_optimizer(checkpoint)
        if checkpoint is None:
            return
        saved, state = self._read(checkpoint)["optimizer"], self._optimizer_state()
        for name, parameter in self.trained.items():
            if name in saved:
                state[parameter] = {
                    key: value.to(parameter.device) if isinstance(value, Tensor) and value.ndim else value
                    for key, value in saved[name].items()
                }
