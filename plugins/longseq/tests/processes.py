"""Run by ``torchrun``: ``processes.py TASK [ARGUMENT ...]``; what is compared is written as JSON, one line."""

import json
import os
import sys

import torch
import torch.distributed as dist
from arctic_plugins_huggingface import ArcticTrainingArguments, attach, load_model, register
from transformers import Trainer

from arctic_plugins import Stack
from arctic_plugins.errors import UserError
from arctic_plugins.testing import QUIET_RUN, say

VOCABULARY = 272
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


class _InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def texts(kind, count=24):
    """Rows of 21 tokens: plain ones with a prompt that is not in the loss, some with padding behind, or three packed
    texts in each.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (count, 21), generator=generator)
    rows = []
    for number, row in enumerate(ids):
        labels = row.clone()
        labels[: 3 + number % 9] = -100
        entry = {"input_ids": row, "labels": labels}
        if kind == "padded":
            length = 21 - 2 * (number % 3)
            labels[length:] = -100
            entry["attention_mask"] = (torch.arange(21) < length).long()
        if kind == "packed":
            entry["position_ids"] = torch.cat([torch.arange(length) for length in (9, 5, 7)])
        rows.append(entry)
    return rows


def built(checkpoint, output, plugins, kind="plain", attention="sdpa", mixes=False, **options):
    """Global batches of 4 rows, whatever the number of processes. With ``mixes``, tokens meet outside attention."""
    shared = plugins.get("longseq", {}).get("sequence_parallel", 1)
    defaults = {
        "output_dir": str(output),
        "plugins": plugins,
        "per_device_train_batch_size": 4 * shared // WORLD // options.get("gradient_accumulation_steps", 1),
        "per_device_eval_batch_size": 2,
        "max_steps": 5,
    }
    args = ArcticTrainingArguments(**{**QUIET_RUN, **defaults, **options})
    stack = Stack.from_dict(args.plugins)
    torch.manual_seed(0)  # adapters are drawn at random
    model, tokenizer = load_model(checkpoint, stack, attn_implementation=attention)
    if mixes:
        mlp = model.model.layers[0].mlp
        mlp.forward = lambda x, stock=mlp.forward: stock(x + x.cumsum(1))
    rows = texts(kind)
    trainer = _InOrder(model=model, args=args, train_dataset=rows, eval_dataset=rows[:7], processing_class=tokenizer)
    return attach(trainer, stack)


def train(jobs):
    """Each job: checkpoint, output, plugins, kind of texts, options."""
    for job in json.loads(jobs):
        trainer, seen = built(**job), []
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        if trainer.is_world_process_zero():
            history, model = trainer.state.log_history, trainer.accelerator.unwrap_model(trainer.model)
            figures = {key: [entry[key] for entry in history if key in entry] for key in ("loss", "grad_norm")}
            norms = {
                name: p.detach().norm().item()
                for name, p in model.named_parameters()
                if p.requires_grad and ".experts." not in name
            }
            say({**figures, "eval_loss": evaluated, "norms": norms, "tokens": max(seen)})


def refuse(jobs):
    """What keeps each job from being built."""
    for job in json.loads(jobs):
        try:
            built(**job)
        except UserError as error:
            if dist.get_rank() == 0:
                say({"error": str(error)})


def generate(checkpoint, output):
    """A model that was attached still answers by itself, in every process."""
    trainer = built(checkpoint, output, {"longseq": {"sequence_parallel": WORLD}})
    ids = torch.arange(5, 12)[None] + dist.get_rank()
    options = {"max_new_tokens": 5 + dist.get_rank(), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain, _ = load_model(checkpoint)
    say({"same": torch.equal(trainer.model.generate(ids, **options), plain.generate(ids, **options))})


if __name__ == "__main__":
    register()
    torch.set_num_threads(1)
    if WORLD > 1:
        dist.init_process_group("gloo")
    globals()[sys.argv[1]](*sys.argv[2:])
    if WORLD > 1:
        dist.destroy_process_group()
