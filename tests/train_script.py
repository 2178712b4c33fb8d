"""Run by `torchrun` (or plain Python): fine-tunes a checkpoint as a user's own script would and writes the losses."""

import json
import sys

import torch
from arctic_plugins_huggingface import ArcticTrainingArguments, attach, load_model
from transformers import HfArgumentParser, Trainer

from arctic_plugins import Stack

if __name__ == "__main__":
    checkpoint, losses_file, *arguments = sys.argv[1:]
    (args,) = HfArgumentParser(ArcticTrainingArguments).parse_args_into_dataclasses(arguments)
    stack = Stack.from_dict(args.plugins)
    torch.manual_seed(0)
    model, _ = load_model(checkpoint, stack)
    texts = [torch.arange(24) % 3 + 20 + row % 4 for row in range(32)]
    trainer = attach(Trainer(model=model, args=args, train_dataset=[{"input_ids": ids, "labels": ids} for ids in texts]), stack)
    trainer.train()
    if trainer.is_world_process_zero():
        with open(losses_file, "w") as file:
            json.dump([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], file)
