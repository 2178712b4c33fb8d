"""A script of your own that uses the ordinary Trainer with a stack.

Run:
    python examples/train_with_trainer.py CHECKPOINT --output_dir out --max_steps 4 --use_cpu --report_to none \\
        --plugins '{"fp8": {}, "lora": {"r": 8}}'
"""

import sys

from arctic_plugins_huggingface import ArcticTrainingArguments, attach, load_model
from transformers import HfArgumentParser, Trainer

from arctic_plugins import Stack
from arctic_plugins.ending import is_distributed, leave

checkpoint = sys.argv[1]
(args,) = HfArgumentParser(ArcticTrainingArguments).parse_args_into_dataclasses(sys.argv[2:])
stack = Stack.from_dict(args.plugins)
model, tokenizer = load_model(checkpoint, stack)
texts = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs."] * 8
rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]]
trainer = attach(Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer), stack)
print(f"mean loss {trainer.train().training_loss:.3f}")
del trainer, model
if is_distributed():
    leave()
