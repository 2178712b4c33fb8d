"""The real vLLM engine on CPU: with speculation it answers what transformers does, and samples from the same
distribution.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from arctic_plugins_huggingface import load_model, save_checkpoint
from arctic_plugins_huggingface.checkpoints import load_checkpoint
from transformers import AutoModelForCausalLM

from arctic_plugins import Stack
from arctic_plugins.resolver import host_version
from arctic_plugins.testing import draw_adapter, engines, said, small_engine, tiny_llama

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(host_version("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares the CPU engine"),
]

PROMPTS = [list(range(10, 210)), [*range(40, 47)] * 3, [9]]
"""The first is longer than a block of keys and values (128 tokens on CPU), and than a step (64)."""
TOKENS, ROUNDS = 24, 3
LLM = {"max_model_len": 256, "dtype": "float32", "enforce_eager": True, "max_num_seqs": 2, "seed": 0}
CHUNKED = {"max_num_batched_tokens": 64, "enable_chunked_prefill": True, "enable_prefix_caching": True}
SAMPLED = {"prompt": [20, 21, 22, 20, 21, 22, 20, 21], "times": 800, "top_k": 3, "temperature": 0.7}


@torch.no_grad()
def reference(model):
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@torch.no_grad()
def distribution(model, ids):
    """Token -> probability, as vLLM samples."""
    logits = model(torch.tensor([ids])).logits[0, -1] / SAMPLED["temperature"]
    values, tokens = logits.topk(SAMPLED["top_k"])
    return dict(zip(tokens.tolist(), values.double().softmax(-1).tolist(), strict=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An encoded checkpoint, an adapter over it, a plain checkpoint, and a draft model cut from it."""
    where = tmp_path_factory.mktemp("models")
    plain = tiny_llama(where / "plain")
    stack = Stack.from_dict({"fp8": {"group_size": 64}})
    encoded = save_checkpoint(*load_model(plain, stack), where / "encoded", stack)
    trained = Stack.from_dict({"fp8": {"group_size": 64}, "lora": {"r": 4, "alpha": 8}, "speculate": {}})
    model, tokenizer = load_model(encoded, trained)
    draw_adapter(model)
    adapter = save_checkpoint(model, tokenizer, where / "adapter", trained)
    small = AutoModelForCausalLM.from_pretrained(plain, num_hidden_layers=1)
    small.save_pretrained(where / "small")
    return {"plain": plain, "encoded": encoded, "adapter": adapter, "small": where / "small"}


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    where = tmp_path_factory.mktemp("engine")
    path = {name: str(directory) for name, directory in models.items()}
    common = {"prompts": PROMPTS, "tokens": TOKENS, "rounds": ROUNDS}
    draft = {"speculate": {"method": "draft", "model": path["small"]}}
    # vLLM 0.32 starts no engine on CPU in a process that has imported numba (`_rebind_kernels`), as the last one does.
    jobs = [
        {"config": True, "checkpoint": path["plain"], "plugins": {"speculate": {"method": "ngram"}}, "llm": LLM},
        {**common, "checkpoint": path["plain"], "plugins": {"fp8": {}, **draft}, "llm": LLM},
        {
            **common,
            # The adapter records `speculate`; these options take the place of its own.
            "checkpoint": path["adapter"],
            "base": path["encoded"],
            "plugins": {"speculate": {"min_token_prob": 0}},
            "llm": {**LLM, **CHUNKED},
            "adapter": path["adapter"],
            "sampled": SAMPLED,
        },
    ]
    (where / "jobs.json").write_text(json.dumps(jobs))
    command = [Path(__file__).with_name("speculating.py"), str(where / "jobs.json")]
    found = said(engines().run(command, timeout=900, environment=small_engine(where / "cache")))
    return dict(zip(("ngram", "draft", "suffix"), found, strict=True))


def test_suffix_over_encoded_weights_with_and_without_an_adapter(models, results):
    for name, model in (("base", load_model(models["encoded"])[0]), ("adapter", load_checkpoint(models["adapter"])[0])):
        expected = reference(model.eval())
        for found in results["suffix"][name]:
            assert found["tokens"] == expected
        assert results["suffix"][name][1]["cached"][0] == 128, "the prefix cache was not used"
    (_, drafted, accepted), (_, again_drafted, again) = (results["suffix"]["base"][index]["counts"] for index in (0, 1))
    assert 0 < accepted < drafted
    assert again - accepted > 0.7 * (again_drafted - drafted) > TOKENS, "answers were given before"


def test_sampling_keeps_its_distribution(models, results):
    """Pearson's chi-squared test over pairs of tokens; the second of a pair was often drafted."""
    model = load_model(models["encoded"])[0].eval()
    first = distribution(model, SAMPLED["prompt"])
    expected = {
        (one, other): SAMPLED["times"] * chance * then
        for one, chance in first.items()
        for other, then in distribution(model, [*SAMPLED["prompt"], one]).items()
    }
    _, drafted, accepted = results["suffix"]["counts"]
    assert SAMPLED["times"] / 4 < accepted < 0.9 * drafted, "too few drafts, or none that is rejected, to tell"
    found = Counter(map(tuple, results["suffix"]["sampled"]))
    assert found.keys() <= expected.keys()
    assert min(expected.values()) > 5
    statistic = sum((found[pair] - count) ** 2 / count for pair, count in expected.items())
    assert len(expected) == 9
    assert statistic < 26.1  # 8 degrees of freedom, p = 0.001


def test_a_draft_model_for_weights_that_are_encoded_while_loading(models, results):
    expected = reference(load_model(models["plain"], Stack.from_dict({"fp8": {}}))[0].eval())
    assert [found["tokens"] for found in results["draft"]["base"]] == [expected] * ROUNDS
    _, drafted, accepted = results["draft"]["base"][-1]["counts"]
    assert 0 < accepted < drafted


def test_vllm_accepts_the_options_of_its_own_ngrams(results):
    assert results["ngram"] == {"method": "ngram", "tokens": 3, "longest": 5}
