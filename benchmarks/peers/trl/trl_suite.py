"""A pytest plugin that runs TRL's own tests of its trainers over plain or encoded models, without a network.

README.md in this folder says how. Models and data sets of the Hub are replaced by random models of the same
architecture and by small data sets with the same columns. With ``--base '{"fp8": {}}'``, causal models are encoded as
soon as they are loaded. Encoded weights do not train, so ``--lora`` gives an adapter to every trainer that a test
makes without one.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

HUB = Path(tempfile.mkdtemp())
os.environ.update(HF_HUB_CACHE=str(HUB), HF_HUB_OFFLINE="1")  # read when huggingface_hub is imported

import datasets  # noqa: E402
import trl  # noqa: E402
from arctic_plugins_huggingface import freeze  # noqa: E402
from arctic_plugins_huggingface.loading import register  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402
from transformers import AutoTokenizer, PreTrainedModel  # noqa: E402

from arctic_plugins import Stack  # noqa: E402
from arctic_plugins.frozen import FrozenExperts, FrozenLinear  # noqa: E402
from arctic_plugins.testing import tiny_model  # noqa: E402

ORGANIZATION = "trl-internal-testing/"
TOKENS = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<tool_call>", "</tool_call>", "<|finetune_right_pad_id|>")
SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "eos_token_id": 261,
    "pad_token_id": 262,
}
"""Sizes of every model. The tokens are ``TOKENS``, after the 261 that :func:`tiny_model` writes."""
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", "qwen2_5", {}),
    "tiny-Qwen3ForCausalLM": ("qwen3", "qwen3", {}),
    "tiny-Qwen3MoeForCausalLM": (
        "qwen3_moe",
        "qwen3",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "tiny-LlamaForCausalLM-3": ("llama", "llama3", {}),
    "tiny-LlamaForCausalLM-3.1": ("llama", "llama3_1", {}),
    "tiny-LlamaForCausalLM-3.2": ("llama", "llama3_2", {}),
    "tiny-MistralForCausalLM-0.1": ("mistral", "", {}),
    "tiny-MistralForCausalLM-0.2": ("mistral", "", {}),
    "tiny-GptOssForCausalLM": ("gpt_oss", "gptoss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "tiny-CohereForCausalLM": ("cohere", "cohere", {}),
    "tiny-Cohere2ForCausalLM": ("cohere2", "cohere2", {}),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", "glm4moe", {**EXPERTS, "first_k_dense_replace": 1}),
    "tiny-NemotronHForCausalLM-nano": (
        "nemotron_h",
        "nemotron_3_nano",
        {
            **EXPERTS,
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 4,
            "n_groups": 1,
            "ssm_state_size": 16,
            "moe_shared_expert_intermediate_size": 32,
            "use_mamba_kernels": False,
            "num_hidden_layers": 3,
        },
    ),
    "tiny-Olmo3ForCausalLM": ("olmo3", "", {}),
    "tiny-Lfm2ForCausalLM": ("lfm2", "lfm2", {"full_attn_idxs": [1], "block_multiple_of": 8, "use_cache": False}),
    "tiny-Lfm2ForCausalLM-2.5": (
        "lfm2",
        "lfm2_2_5",
        {"full_attn_idxs": [1], "block_multiple_of": 8, "use_cache": False},
    ),
    "tiny-GemmaForCausalLM": ("gemma", "gemma", {}),
    "tiny-Gemma2ForCausalLM": ("gemma2", "gemma", {}),
    "tiny-GPTNeoXForCausalLM": ("gpt_neox", "", {}),
    "tiny-Phi3ForCausalLM": ("phi3", "phi3", {}),
    "tiny-DeepseekV3ForCausalLM": ("deepseek_v3", "deepseekv3", {**EXPERTS, **LATENT, "n_group": 1, "topk_group": 1}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2", "qwen2_5", {"num_labels": 1}),
    "tiny-Qwen3ForSequenceClassification": ("qwen3", "qwen3", {"num_labels": 1}),
    "tiny-LlamaForSequenceClassification-3.2": ("llama", "llama3_2", {"num_labels": 1}),
}
"""Name on the Hub -> (model_type, chat template of TRL's package or none, config)."""

LORA = LoraConfig(target_modules="all-linear", exclude_modules=["conv1d", "out_proj"])
"""The adapter that ``--lora`` adds. PEFT adapts no convolution and no output of a Mamba layer."""

PAIRS = [
    ("What is better than ugly?", "Beautiful.", "Nothing."),
    ("What is better than implicit?", "Explicit.", "Guesses."),
    ("What is better than complex?", "Simple.", "Complicated."),
    ("What is better than complicated?", "Complex.", "Nested."),
    ("What is better than nested?", "Flat.", "Deep."),
    ("What is better than dense?", "Sparse.", "Denser."),
    ("What counts?", "Readability.", "Speed."),
    ("What beats purity?", "Practicality.", "Theory."),
    ("What never passes silently?", "Errors.", "Successes."),
    ("Who is Dutch?", "One of them.", "Nobody."),
    ("When?", "Now.", "Never."),
]
"""Prompts, good answers and bad answers. The last two are the test split."""

encoded: Counter[bool] = Counter()
"""Number of loaded models with encoded modules (True) and without (False)."""

ABSENT = {
    "trl.import_utils": ("is_joblib_available",),
    "trl.trainer.sft_trainer": ("_chunked_cross_entropy_loss", "_patch_chunked_ce_lm_head", "dft_loss"),
}
"""What the tests import and TRL 1.16 lacks."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--base`` and ``--lora``."""
    parser.addoption("--base", default="{}", help="plugins as in a recipe, in JSON; none for plain models")
    parser.addoption("--lora", action="store_true", help="train an adapter where a test would train every weight")


def pytest_configure(config: pytest.Config) -> None:
    """Replace the Hub, and encode what is loaded from it."""
    config.add_cleanup(lambda: shutil.rmtree(HUB, ignore_errors=True))
    register()
    for name in MODELS:
        _publish(name)
    datasets.load_dataset = load_dataset
    for module, absent in ABSENT.items():
        for name in absent:
            vars(import_module(module)).setdefault(name, lambda: False)
    stack = Stack.from_dict(json.loads(config.getoption("--base")))
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
        model = load(cls, name, *args, **kwargs)
        base = str(name).startswith(ORGANIZATION) and cls.__name__.endswith("ForCausalLM")
        if not base:
            return model
        frozen = freeze(model, stack)
        encoded.update([sum(isinstance(module, FrozenLinear | FrozenExperts) for module in frozen.modules()) > 0])
        return frozen

    if len(stack):
        PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
    if config.getoption("--lora"):
        for trainer in (trl.SFTTrainer, trl.DPOTrainer, trl.GRPOTrainer):
            trainer.__init__ = _adapted(trainer.__init__)  # type: ignore[method-assign]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many models were encoded, so that a run over plain ones cannot pass for another."""
    terminalreporter.write_line(f"{encoded[True]} models were encoded, {encoded[False]} had nothing to encode")


def _publish(name: str) -> None:
    """Write the model ``name`` into the cache of the Hub, as if it had been downloaded."""
    model_type, template, options = MODELS[name]
    folder = HUB / f"models--{ORGANIZATION.rstrip('/')}--{name}"
    classifies = "SequenceClassification" in name
    directory = tiny_model(
        folder / "snapshots" / "local",
        model_type,
        auto_class="AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM",
        **{**SIZES, **options},
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, *TOKENS]})
    tokenizer.eos_token, tokenizer.pad_token = TOKENS[:2]
    if template:
        templates = Path(inspect.getfile(trl)).parent / "chat_templates"
        tokenizer.chat_template = (templates / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(directory)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("local", encoding="utf-8")


def _adapted(init: Callable[..., None]) -> Callable[..., None]:
    """Return ``init`` of a trainer that adds an adapter to a model which has none.

    TRL's tests check that each of ``trainer.model.named_parameters()`` has changed. With an adapter, those that train
    are named.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def adapted(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        if isinstance(given.get("model"), PeftModel) or given.get("peft_config") is not None:
            return init(self, *args, **kwargs)
        init(self, *args, **{**kwargs, "peft_config": copy.deepcopy(LORA)})
        every = self.model.named_parameters
        self.model.named_parameters = lambda *args, **kwargs: (
            (name, parameter) for name, parameter in every(*args, **kwargs) if parameter.requires_grad
        )
        return None

    return adapted


def load_dataset(path: str, name: str | None = None, *, split: str | None = None, streaming: bool = False) -> Any:
    """Return the data set that stands for ``path``: nine records to train on, two to test on."""
    if not path.startswith(ORGANIZATION):
        raise FileNotFoundError(f"{path} has no local stand-in")
    rows = [_record(path.removeprefix(ORGANIZATION), name or "", *pair) for pair in PAIRS]
    splits = {"train": datasets.Dataset.from_list(rows[:9]), "test": datasets.Dataset.from_list(rows[9:])}
    if split is not None:
        which, until = re.fullmatch(r"(\w+?)(?:\[:(\d+)\])?", split).groups()  # type: ignore[union-attr]
        found = splits[which].select(range(int(until))) if until else splits[which]
        return found.to_iterable_dataset() if streaming else found
    if streaming:
        return datasets.IterableDatasetDict({key: found.to_iterable_dataset() for key, found in splits.items()})
    return datasets.DatasetDict(splits)


def _record(source: str, config: str, question: str, answer: str, wrong: str) -> dict[str, Any]:
    """Return one record of the data set ``source`` in the format that ``config`` names."""
    plain = config.startswith("standard_")
    extra: dict[str, Any] = {}
    answers = {"role": "assistant"}
    if source == "harmony":
        answers["thinking"] = "Consider the question."
        extra["chat_template_kwargs"] = {"reasoning_effort": "low", "model_identity": "You are tiny."}
    elif source == "toolcall":
        parameters = {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}
        function = {"name": "look_up", "description": "Looks something up.", "parameters": parameters}
        extra["tools"] = json.dumps([{"type": "function", "function": function}])
    elif source != "zen":
        raise FileNotFoundError(f"{source} has no local stand-in")
    prompt: Any = question if plain else [{"role": "user", "content": question}]
    good: Any = f" {answer}" if plain else [{**answers, "content": answer}]
    bad: Any = f" {wrong}" if plain else [{**answers, "content": wrong}]
    if source == "toolcall" and config == "language_modeling":
        call = {"type": "function", "function": {"name": "look_up", "arguments": {"what": question}}}
        good = [
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "name": "look_up", "content": answer},
            {"role": "assistant", "content": answer},
        ]
    kind = re.sub("^(standard|conversational)_", "", config)
    formats = {
        "language_modeling": {"text" if plain else "messages": prompt + good},
        "prompt_only": {"prompt": prompt},
        "prompt_completion": {"prompt": prompt, "completion": good},
        "preference": {"prompt": prompt, "chosen": good, "rejected": bad},
        "implicit_prompt_preference": {"chosen": prompt + good, "rejected": prompt + bad},
        "unpaired_preference": {"prompt": prompt, "completion": good, "label": True},
    }
    return formats[kind] | extra
