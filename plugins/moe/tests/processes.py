"""Run by ``torchrun``: ``processes.py TASK [ARGUMENT ...]``; what is compared is written as JSON, one line."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from arctic_plugins_huggingface import ArcticTrainingArguments, attach, load_model, register, save_checkpoint
from arctic_plugins_moe.config import MoEConfig
from arctic_plugins_moe.dispatch import ExpertParallel
from transformers import Trainer

from arctic_plugins import Stack
from arctic_plugins.frozen import local_parameters
from arctic_plugins.testing import QUIET_RUN, DispatchSuite, say

VOCABULARY, LENGTH = 272, 16
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def rows(count):
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": ids, "labels": ids} for ids in torch.randint(5, VOCABULARY, (count, LENGTH), generator=generator)
    ]


def trainer(checkpoint, plugins, output, **options):
    """Global batches of 8 rows, whatever the number of processes and accumulated steps."""
    accumulate = options.pop("gradient_accumulation_steps", 1)
    defaults = {
        "output_dir": str(output),
        "plugins": plugins,
        "per_device_train_batch_size": 8 // WORLD // accumulate,
        "gradient_accumulation_steps": accumulate,
        "max_steps": 20,
        "lr_scheduler_type": "constant",
    }
    args = ArcticTrainingArguments(**{**QUIET_RUN, **defaults, **options})
    stack = Stack.from_dict(args.plugins)
    torch.manual_seed(0)  # adapters are drawn at random
    model, tokenizer = load_model(checkpoint, stack)
    model.config.use_cache = False
    # Not shuffled: the global batches are the same in any number of processes.
    built = attach(
        _InOrder(model=model, args=args, train_dataset=rows(8 * 20), eval_dataset=rows(6), processing_class=tokenizer),
        stack,
    )
    return built, stack, tokenizer


class _InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def figures(history):
    return {key: [round(entry[key], 6) for entry in history if key in entry] for key in ("loss", "grad_norm")}


def train(checkpoint, output, plugins, options="{}"):
    built, stack, tokenizer = trainer(checkpoint, json.loads(plugins), output, **json.loads(options))
    built.train()
    save_checkpoint(built.accelerator.unwrap_model(built.model), tokenizer, Path(output) / "final", stack)
    if built.is_world_process_zero():
        routers = {key for entry in built.state.log_history for key in entry if key.startswith("moe/")}
        say(
            {
                **figures(built.state.log_history),
                "local": len(local_parameters(built.model)),
                "figures": sorted(routers),
            }
        )


def check(options):
    """The conformance suite."""
    DispatchSuite().check(dispatch=ExpertParallel(MoEConfig(**json.loads(options))))
    say({"checked": True})


def resume(checkpoint, output, plugins, options="{}"):
    built, _, _ = trainer(checkpoint, json.loads(plugins), output, **json.loads(options))
    built.train(resume_from_checkpoint=f"{output}/checkpoint-10")
    if built.is_world_process_zero():
        say(figures(built.state.log_history))


def best(checkpoint, output, plugins, options="{}"):
    """Two checkpoints, of which the first is said to be the better one, which is back at the end."""
    saves = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_total_limit": 1,
    }
    wanted = {"load_best_model_at_end": True, "metric_for_best_model": "turn", "greater_is_better": False}
    built, _, _ = trainer(checkpoint, json.loads(plugins), output, **saves, **wanted, **json.loads(options))
    seen, evaluate = {}, built.evaluate

    def turns(*args, **kwargs):
        seen[built.state.global_step] = {
            name: p.detach().clone() for name, p in built.model.named_parameters() if p.requires_grad
        }
        return {**evaluate(*args, **kwargs), "eval_turn": float(len(seen))}

    built.evaluate = turns
    built.train()
    after = dict(built.model.named_parameters())
    say(
        {
            kind: [torch.equal(after[name], value) for name, value in seen[step].items()]
            for kind, step in (("best", 2), ("last", 4))
        }
    )


def unattached(checkpoint, output, plugins):
    attached, _, _ = trainer(checkpoint, json.loads(plugins), output)
    model, _ = load_model(checkpoint, Stack.from_dict(json.loads(plugins)))
    Trainer(model=model, args=attached.args, train_dataset=rows(8)).train()


def only_experts(checkpoint, output, plugins):
    stack = Stack.from_dict(json.loads(plugins))
    model, _ = load_model(checkpoint, stack)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." in name)
    attach(Trainer(model=model, args=ArcticTrainingArguments(output_dir=output, use_cpu=True, report_to="none")), stack)


def half(checkpoint, output, plugins):
    stack = Stack.from_dict(json.loads(plugins))
    args = ArcticTrainingArguments(output_dir=output, use_cpu=True, report_to="none")
    args.fp16 = True  # transformers wants a GPU for it
    attach(Trainer(model=load_model(checkpoint, stack)[0], args=args), stack)


def generate(checkpoint, plugins):
    """Processes with texts of different lengths."""
    plain, _ = load_model(checkpoint)
    model, _ = load_model(checkpoint, Stack.from_dict(json.loads(plugins)))
    ids = torch.arange(5, 12)[None] + dist.get_rank()
    options = {"max_new_tokens": 3 + 5 * dist.get_rank(), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    length = ids.shape[1] + options["max_new_tokens"]
    say({"same": torch.equal(model.generate(ids, **options)[:, :length], plain.generate(ids, **options))})


def save(checkpoint, output, plugins):
    stack = Stack.from_dict(json.loads(plugins))
    save_checkpoint(*load_model(checkpoint, stack), Path(output), stack)


def compare(checkpoint, plugins):
    """This process's logits and gradients against those of a model that is whole."""
    base = json.loads(plugins)
    whole, _ = load_model(checkpoint, Stack.from_dict(base))
    model, _ = load_model(checkpoint, Stack.from_dict({**base, "moe": {"expert_parallel": WORLD}}))
    ids = torch.randint(5, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(dist.get_rank()))
    with torch.no_grad():
        logits = (whole.eval()(ids).logits - model.eval()(ids).logits).abs().max().item()
    found = {
        "logits": logits,
        "gradients": 0.0,
        "elements": sum(p.numel() for p in model.parameters()),
        "whole": sum(p.numel() for p in whole.parameters()),
    }
    if not base:
        for one in (whole.train(), model.train()):
            one(ids, labels=ids).loss.backward()
        expected, local, share = dict(whole.named_parameters()), local_parameters(model), slice(None)
        for name, parameter in model.named_parameters():
            theirs, ours = expected[name].grad, parameter.grad
            dist.all_reduce(theirs)
            if name in local:
                share = local[name][1].local(len(theirs))
                theirs = theirs[share]
            else:
                dist.all_reduce(ours)
            found["gradients"] = max(
                found["gradients"], ((ours - theirs).norm() / theirs.norm().clamp_min(1e-9)).item()
            )
    say(found)


if __name__ == "__main__":
    register()
    if WORLD > 1:
        dist.init_process_group("gloo")
    task, *arguments = sys.argv[1:]
    globals()[task](*arguments)
    if WORLD > 1:
        dist.destroy_process_group()
