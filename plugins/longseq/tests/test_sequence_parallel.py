"""Texts in several real processes (gloo): the losses, gradients and weights of one process, whatever the model, the
texts and the attention.
"""

import copy
from pathlib import Path

import pytest
import torch
from arctic_plugins_huggingface import register
from arctic_plugins_longseq.ulysses import Heads

from arctic_plugins.testing import LLAMA_LIKE, MIXTURES, run_processes, said, tiny_model

SCRIPT = Path(__file__).with_name("processes.py")
MODELS = {
    "llama": ("llama", {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}),
    "smollm2": (
        "llama",
        {
            "tie_word_embeddings": True,
            "hidden_size": 144,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 16,
        },
    ),
    "gemma3": (
        LLAMA_LIKE["gemma3"][0],
        {**LLAMA_LIKE["gemma3"][1], "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6},
    ),
    "mixtral": (MIXTURES["mixtral"][0], {**MIXTURES["mixtral"][1], "num_attention_heads": 4, "num_key_value_heads": 4}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96}),
}
JOBS = {
    "plain": {"checkpoint": "llama"},
    "padded": {"checkpoint": "llama", "kind": "padded", "attention": "eager"},
    "packed, uneven heads, adapters": {
        "checkpoint": "smollm2",
        "kind": "packed",
        "plugins": {"fp8": {}, "lora": {"r": 4}},
    },
    "recomputed": {
        "checkpoint": "smollm2",
        "kind": "padded",
        "gradient_checkpointing": True,
        "plugins": {"longseq": {"tiled_mlp": True}},
    },
    "windows": {"checkpoint": "gemma3", "kind": "packed", "plugins": {"longseq": {"tiled_loss": False}}},
    "frequencies by length": {
        "checkpoint": "llama",
        "plugins": {"rope": {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}},
    },
    "experts": {"checkpoint": "mixtral", "kind": "padded", "plugins": {"moe": {"expert_parallel": 2}}},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    register()
    directory = tmp_path_factory.mktemp("models")
    return {name: tiny_model(directory / name, model_type, **config) for name, (model_type, config) in MODELS.items()}


def run(processes, task, *arguments):
    """``task`` of ``processes.py``: what the processes said."""
    return said(run_processes(SCRIPT, processes, task, *arguments, timeout=900))


def jobs(checkpoints, output, shared=1, **options):
    made = []
    for number, (name, job) in enumerate(JOBS.items()):
        job = {
            "output": output / str(number),
            **copy.deepcopy({"plugins": {}, **job}),
            **(options if name != "experts" else {}),
        }
        job["checkpoint"] = checkpoints[job["checkpoint"]]
        if shared > 1:
            job["plugins"].setdefault("longseq", {})["sequence_parallel"] = shared
        else:
            job["plugins"].pop("moe", None)
        made.append(job)
    return made


@pytest.fixture(scope="module")
def alone(checkpoints, tmp_path_factory):
    return run(1, "train", jobs(checkpoints, tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize(
    ("processes", "shared", "options"),
    [
        (2, 2, {}),
        pytest.param(4, 4, {}, marks=pytest.mark.slow),
        pytest.param(4, 2, {"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_equals_one_process(checkpoints, alone, tmp_path, processes, shared, options):
    results = run(processes, "train", jobs(checkpoints, tmp_path, shared, **options))
    for name, found, expected in zip(JOBS, results, alone, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4), name
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3), name
        if (
            processes == shared
        ):  # else transformers averages over batches, as it does over processes without texts in parts
            assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4), name
        for weight, norm in found["norms"].items():
            assert norm == pytest.approx(expected["norms"][weight], rel=1e-4), (name, weight)
        assert found["tokens"] == -(-expected["tokens"] // shared), "each process computes its own tokens only"


def test_what_would_be_computed_wrongly_is_refused(checkpoints, tmp_path):
    whole = {"output": tmp_path, "checkpoint": checkpoints["llama"], "plugins": {"longseq": {"sequence_parallel": 2}}}
    errors = run(
        2,
        "refuse",
        [
            {**whole, "checkpoint": checkpoints["lfm2"]},
            {**whole, "mixes": True},
            {**whole, "plugins": {"longseq": {"sequence_parallel": 3}}},
            {**whole, "label_smoothing_factor": 0.1},
            {**whole, "average_tokens_across_devices": False},
        ],
    )
    texts = [
        "Lfm2ForCausalLM has conv",
        "has other logits when a text is split",
        "a divisor of the number",
        "label_smoothing_factor",
        "is off",
    ]
    assert len(errors) == len(texts)
    for found, text in zip(errors, texts, strict=True):
        assert text in found["error"]
        assert "\n" not in found["error"]


def test_an_attached_model_answers_by_itself(checkpoints, tmp_path):
    assert run(2, "generate", checkpoints["llama"], tmp_path) == [{"same": True}] * 2


@pytest.mark.parametrize(
    ("processes", "heads", "keys"), [(2, 4, 2), (2, 9, 3), (4, 9, 3), (4, 8, 2), (3, 8, 8), (8, 8, 1)]
)
def test_every_head_meets_its_key(processes, heads, keys):
    groups = heads // keys
    of = Heads.of(processes, heads, keys)
    assert [head for h in of for head in range(h.first, h.last)] == list(range(heads))
    assert max(h.count for h in of) - min(h.count for h in of) <= 1
    every_key = torch.arange(keys)[None, :, None, None]
    for h in of:
        mine = every_key[:, h.keys]
        expected = [head // groups for head in range(h.first, h.last)]
        assert h.spread(mine).flatten().tolist() == expected
        if h.shared is not None:
            assert mine.repeat_interleave(h.shared, 1).flatten().tolist() == expected
