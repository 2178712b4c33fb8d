"""Run by `torchrun` (or plain Python): fine-tunes a checkpoint as a user's own script would and writes the losses."""

import json
import os
import signal
import sys

import torch
from arctic_plugins_huggingface import ArcticTrainingArguments, attach, last_checkpoint, load_model
from transformers import HfArgumentParser, Trainer, TrainerCallback

from arctic_plugins import Stack
from arctic_plugins.ending import leave


class Killed(TrainerCallback):
    """Kills the processes of these ranks within the save of a step, before the checkpoint is complete."""

    def __init__(self, step, ranks):
        self.step, self.ranks = step, ranks

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index in self.ranks:
            os.kill(os.getpid(), signal.SIGKILL)


class Spoilt(TrainerCallback):
    """Puts NaN into the gradients of these ranks before the optimizer's step, as damaged memory would."""

    def __init__(self, step, ranks):
        self.step, self.ranks = step, ranks

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step + 1 == self.step and args.process_index in self.ranks:
            next(parameter.grad for parameter in model.parameters() if parameter.grad is not None).fill_(torch.nan)


def main():
    checkpoint, losses_file, *arguments = sys.argv[1:]
    (args,) = HfArgumentParser(ArcticTrainingArguments).parse_args_into_dataclasses(arguments)
    stack = Stack.from_dict(args.plugins)
    torch.manual_seed(0)
    model, _ = load_model(checkpoint, stack)
    texts = [torch.arange(24) % 3 + 20 + row % 4 for row in range(32)]
    callbacks = [
        kind(*json.loads(os.environ[name]))
        for name, kind in (("KILL", Killed), ("SPOIL", Spoilt))
        if name in os.environ
    ]
    rows = [{"input_ids": ids, "labels": ids} for ids in texts]
    trainer = attach(Trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks), stack)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir)[0])
    if trainer.is_world_process_zero():
        with open(losses_file, "w") as file:
            json.dump([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], file)


if __name__ == "__main__":
    main()
    if (
        "TORCHELASTIC_RUN_ID" in os.environ
    ):  # a process of torchrun's, not a fork: a thread of gloo may abort one that finalizes its interpreter
        leave()
