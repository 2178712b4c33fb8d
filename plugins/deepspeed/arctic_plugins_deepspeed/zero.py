"""Training with DeepSpeed's ZeRO over encoded weights and spread experts. Read in deepspeed 0.19.8 and accelerate
1.15.0.

DeepSpeed knows experts of its own ``MoE`` layers: parameters with ``allreduce = False`` and the name of a group, in
optimizer groups marked ``moe``. Their gradients are added up among the processes that have the same experts, their
optimizer state is partitioned among them, and the norm that gradients are clipped by is that of all processes. Ours are
marked alike.
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
    """What ``trainer`` needs where DeepSpeed makes its steps."""
    return [SpreadOverZero if is_spread(cast("nn.Module", trainer.model)) else OverDeepSpeed]


class OverDeepSpeed(Trainer):
    """Mixin: encoded weights stay as they are.

    DeepSpeed casts every floating parameter to its dtype (``runtime/engine.py``), the scales of encoded weights too.
    """

    model: nn.Module
    deepspeed: DeepSpeedEngine

    def on_attach(self, plugin: Plugin | None) -> None:
        patch(
            self.accelerator,
            "_prepare_deepspeed",
            why="weights and the optimizer's groups change around the making of the engine, which has no hook",
            read_in="accelerate 1.15.0",
        )(self.prepare_deepspeed)

    def prepare_deepspeed(self, prepare: Callable[..., Any], *objects: Any) -> Any:
        """``Accelerator._prepare_deepspeed``, which is ``prepare``."""
        frozen = [module for module in self.model.modules() if isinstance(module, FrozenModule)]
        encoded = [(parameter, parameter.data) for module in frozen for parameter in module.encoded()]
        prepared = prepare(*objects)
        for parameter, data in encoded:
            parameter.data = data.to(parameter.device)
        return prepared


class SpreadOverZero(SpreadExperts, OverDeepSpeed):
    """Mixin for DeepSpeed with spread experts.

    Raises:
        ConfigError: the stage is neither 1 nor 2.
    """

    def on_attach(self, plugin: Plugin | None) -> None:
        OverDeepSpeed.on_attach(self, plugin)
        SpreadExperts.on_attach(self, plugin)
        stage = self.accelerator.state.deepspeed_plugin.zero_stage
        if stage not in (1, 2):
            raise ConfigError(
                f"training uses DeepSpeed with ZeRO stage {stage} and {self.dispatch.option}",
                expected="stage 1 or 2: at stage 0 DeepSpeed clips by the norm of a process's own experts",
                fix="change the stage, or leave one of the two out",
            )
        for parameter, _ in self.spread.values():  # also frozen ones, which the engine would give all processes alike
            parameter.allreduce, parameter.group_name = False, f"ep_size_{self.dispatch.size}"  # type: ignore[attr-defined]
        self.model.register_load_state_dict_pre_hook(self._keep_own_experts)
        self.add_callback(_TakesWhatWasRead(self))

    def prepare_deepspeed(self, prepare: Callable[..., Any], *objects: Any) -> Any:
        """``Accelerator._prepare_deepspeed``: the engine looks for layers of its own kind when it is made, and must
        find none later.
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
                # Its files are those of a model without experts: a process's own come back from its optimizer's.
                engine.has_moe_layers = False
        return prepared

    def _keep_own_experts(self, _: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """DeepSpeed's file of the model has the experts of the first process: every process keeps its own until the
        optimizer's file is read.
        """
        for name, (parameter, _dispatch) in self.spread.items():
            saved = state.get(f"{prefix}{name}")
            if saved is not None and saved.shape != parameter.shape:
                raise CheckpointError(
                    f"the checkpoint has {name} of shape {list(saved.shape)}, this process {list(parameter.shape)}",
                    expected="as many processes for one copy of the experts as when it was saved",
                    fix=f"set {self.dispatch.option} as it was then",
                )
            if saved is not None:
                state[f"{prefix}{name}"] = parameter.data

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.deepspeed.optimizer.update_lp_params()


class _TakesWhatWasRead(TrainerCallback):
    """After resuming, gives the model what the optimizer has read."""

    def __init__(self, trainer: SpreadOverZero) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
