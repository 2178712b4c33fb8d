"""Spread experts under DeepSpeed's ZeRO, stages 1 and 2. Read in deepspeed 0.19.8 and accelerate 1.15.0.

DeepSpeed knows experts of its own ``MoE`` layers: parameters with ``allreduce = False`` and the name of a group, in
optimizer groups marked ``moe``. Their gradients are added up among the processes that have the same experts, their
optimizer state is partitioned among them, and the norm that gradients are clipped by is that of all processes. Ours are
marked alike.
"""

from __future__ import annotations

from typing import Any

from deepspeed.moe.layer import MoE  # type: ignore[import-untyped]
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer  # type: ignore[import-untyped]
from deepspeed.runtime.engine import DeepSpeedEngine  # type: ignore[import-untyped]
from deepspeed.utils import groups  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins_huggingface.training.experts_ddp import SpreadExperts

__all__ = ["SpreadOverZero"]

_MARKER = "arctic_plugins_experts"


class SpreadOverZero(SpreadExperts):
    """What a trainer with DeepSpeed does otherwise.

    Raises:
        ConfigError: the stage is neither 1 nor 2.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        if stage not in (1, 2):
            raise ConfigError(
                f"training uses DeepSpeed with ZeRO stage {stage} and plugins.moe.expert_parallel",
                expected="stage 1 or 2: at stage 0 DeepSpeed clips by the norm of a process's own experts",
                fix="change the stage, or leave expert_parallel or deepspeed out",
            )
        for parameter, _ in self.local.values():  # also frozen ones, which the engine would give all processes alike
            parameter.allreduce, parameter.group_name = False, f"ep_size_{self.dispatch.size}"  # type: ignore[attr-defined]
        self.prepare = trainer.accelerator._prepare_deepspeed
        trainer.accelerator._prepare_deepspeed = self.prepare_with_experts
        trainer.model.register_load_state_dict_pre_hook(self.keep_own)
        self.load_best_model = trainer._load_best_model
        trainer._load_best_model = self.best

    def prepare_with_experts(self, *objects: Any) -> Any:
        """``Accelerator._prepare_deepspeed``: the engine looks for layers of its own kind when it is made, and must
        find none later.
        """
        for optimizer in objects:
            if isinstance(optimizer, Optimizer):
                named = [{**group, "name": f"group_{number}"} for number, group in enumerate(optimizer.param_groups)]
                optimizer.param_groups[:] = [
                    group for group in split_params_into_different_moe_groups_for_optimizer(named) if group["params"]
                ]
        model: nn.Module = self.trainer.model
        model.add_module(_MARKER, (_Mixtures if self.trained else _Groups)(self.dispatch.size))
        try:
            prepared = self.prepare(*objects)
        finally:
            delattr(model, _MARKER)
        for engine in prepared:
            if isinstance(engine, DeepSpeedEngine):
                engine.has_moe_layers = (
                    False  # its files are those of a model without: a process's experts come back from its optimizer's
                )
        return prepared

    def keep_own(self, _: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """DeepSpeed's file of the model has the experts of the first process: every process keeps its own until the
        optimizer's file is read.
        """
        for name, (parameter, _dispatch) in self.local.items():
            saved = state.get(f"{prefix}{name}")
            if saved is not None and saved.shape != parameter.shape:
                raise CheckpointError(
                    f"the checkpoint has {name} of shape {list(saved.shape)}, this process {list(parameter.shape)}",
                    expected="as many processes for one copy of the experts as when it was saved",
                    fix="set plugins.moe.expert_parallel as it was then",
                )
            if saved is not None:
                state[f"{prefix}{name}"] = parameter.data

    def best(self) -> None:
        """``Trainer._load_best_model``."""
        self.load_best_model()
        self.trainer.deepspeed.optimizer.update_lp_params()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After resuming, give the model what the optimizer has read."""
        self.trainer.deepspeed.optimizer.update_lp_params()


class _Groups(nn.Module):
    """A module for which a DeepSpeed engine makes the groups of processes."""

    def __init__(self, processes: int) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.processes = processes, processes

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        if use_data_before_expert_parallel_:
            raise ConfigError(
                "DeepSpeed's use_data_before_expert_parallelism is set",
                expected="neighbours by rank sharing experts",
                fix="leave it out",
            )
        groups._create_expert_and_data_parallel(self.processes)


class _Mixtures(_Groups, MoE):  # type: ignore[misc]
    """One that makes it take the parameters so marked for experts that are trained."""
