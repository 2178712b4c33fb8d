"""Training with DeepSpeed's ZeRO over encoded weights and experts spread over processes.

Read in deepspeed 0.19.8 and accelerate 1.15.0.

DeepSpeed supports the experts of its own ``MoE`` layers: parameters with ``allreduce = False`` and the name of a group,
in optimizer groups marked ``moe``. Their gradients are summed over the processes that hold the same experts, their
optimizer state is partitioned among these processes, and gradients are clipped by the norm over all processes. This
project marks its experts in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from arctic_plugins_huggingface.checkpoints import is_spread
from arctic_plugins_huggingface.training import SpreadExperts
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from arctic_plugins import Plugin
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.frozen import FrozenModule
from arctic_plugins.patches import patch

__all__ = ["OverDeepSpeed", "SpreadOverZero", "mixins"]

_MARKER = "arctic_plugins_experts"


def mixins(trainer: Trainer) -> list[type[Trainer]]:
    """Return the mixins that ``trainer`` needs when DeepSpeed runs its steps."""
    return [SpreadOverZero if is_spread(cast("nn.Module", trainer.model)) else OverDeepSpeed]


class OverDeepSpeed(Trainer):
    """Mixin that keeps encoded weights unchanged.

    DeepSpeed casts every floating-point parameter to its dtype (``runtime/engine.py``), including the scales of encoded
    weights.
    """

    model: nn.Module
    deepspeed: DeepSpeedEngine

    def on_attach(self, plugin: Plugin | None) -> None:
        patch(
            self.accelerator,
            "_prepare_deepspeed",
            why="weights and the optimizer's groups are changed around the creation of the engine, which has no hook",
            read_in="accelerate 1.15.0",
        )(self.prepare_deepspeed)

    def prepare_deepspeed(self, prepare: Callable[..., Any], *objects: Any) -> Any:
        """Call ``prepare``, which is ``Accelerator._prepare_deepspeed``, and restore the encoded weights after it."""
        frozen = [module for module in self.model.modules() if isinstance(module, FrozenModule)]
        encoded = [(parameter, parameter.data) for module in frozen for parameter in module.encoded()]
        prepared = prepare(*objects)
        for parameter, data in encoded:
            parameter.data = data.to(parameter.device)
        return prepared


class SpreadOverZero(SpreadExperts, OverDeepSpeed):
    """Mixin for DeepSpeed with experts that are spread over processes.

    Raises:
        ConfigError: the ZeRO stage is neither 1 nor 2.
    """

    def on_attach(self, plugin: Plugin | None) -> None:
        OverDeepSpeed.on_attach(self, plugin)
        SpreadExperts.on_attach(self, plugin)
        stage = self.accelerator.state.deepspeed_plugin.zero_stage
        if stage not in (1, 2):
            raise ConfigError(
                f"training uses DeepSpeed with ZeRO stage {stage} and {self.dispatch.option}",
                expected="stage 1 or 2 (at stage 0, DeepSpeed clips by the norm of a process's own experts)",
                fix="change the stage, or leave one of the two out",
            )
        for parameter, _ in self.spread.values():  # also frozen ones, which the engine would broadcast otherwise
            parameter.allreduce, parameter.group_name = False, f"ep_size_{self.dispatch.size}"  # type: ignore[attr-defined]
        self.model.register_load_state_dict_pre_hook(self._keep_own_experts)
        self.add_callback(_TakesWhatWasRead(self))

    def prepare_deepspeed(self, prepare: Callable[..., Any], *objects: Any) -> Any:
        """Call ``Accelerator._prepare_deepspeed`` with a temporary layer of DeepSpeed's kind in the model.

        The engine looks for such layers when it is created, and must not find any later.
        """
        for optimizer in objects:
            if isinstance(optimizer, Optimizer):
                named = [{**group, "name": f"group_{number}"} for number, group in enumerate(optimizer.param_groups)]
                optimizer.param_groups[:] = [
                    group for group in split_params_into_different_moe_groups_for_optimizer(named) if group["params"]
                ]
        model = self.model
        model.add_module(_MARKER, (_Mixtures if self.trained_experts else _Groups)(self.dispatch.size))
        try:
            prepared = super().prepare_deepspeed(prepare, *objects)
        finally:
            delattr(model, _MARKER)
        for engine in prepared:
            if isinstance(engine, DeepSpeedEngine):
                # Save the files of a model without experts: a process restores its own from the optimizer's file.
                engine.has_moe_layers = False
        return prepared

    def _keep_own_experts(self, _: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Replace the experts in ``state`` by this process's own.

        DeepSpeed's model file contains the experts of the first process. Every process keeps its own until the
        optimizer's file is read.
        """
        for name, (parameter, _dispatch) in self.spread.items():
            saved = state.get(f"{prefix}{name}")
            if saved is not None and saved.shape != parameter.shape:
                raise CheckpointError(
                    f"{name} has the shape {list(saved.shape)} in the checkpoint and {list(parameter.shape)} in this "
                    "process",
                    expected="as many processes per copy of the experts as when it was saved",
                    fix=f"set {self.dispatch.option} to the value that it had then",
                )
            if saved is not None:
                state[f"{prefix}{name}"] = parameter.data

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.deepspeed.optimizer.update_lp_params()


class _TakesWhatWasRead(TrainerCallback):
    """Callback that copies the weights that the optimizer has read into the model after resuming."""

    def __init__(self, trainer: SpreadOverZero) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.deepspeed.optimizer.update_lp_params()


class _Groups(nn.Module):
    """A module that makes a DeepSpeed engine create the process groups."""

    def __init__(self, processes: int) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.processes = processes, processes

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        if use_data_before_expert_parallel_:
            raise ConfigError(
                "DeepSpeed's use_data_before_expert_parallelism is set",
                expected="neighbors by rank that share experts",
                fix="leave it out",
            )
        groups._create_expert_and_data_parallel(self.processes)


class _Mixtures(_Groups, MoE):  # type: ignore[misc]
    """A module that also makes the engine treat the marked parameters as trained experts."""
