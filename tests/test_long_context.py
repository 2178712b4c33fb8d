"""A prompt of 131,072 tokens through the real vLLM engine, in chunks and in bounded memory, against transformers."""

import json
from pathlib import Path

import pytest
import torch
from arctic_plugins_huggingface import load_model, save_checkpoint

from arctic_plugins import Stack
from arctic_plugins.resolver import host_version
from arctic_plugins.testing import engines, said, small_engine, tiny_llama

ORIGINAL, LENGTH = 2048, 131072


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(host_version("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares the CPU engine")
@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_the_last_token_of_a_prompt_of_128k_is_that_of_transformers(tmp_path, kind):
    sizes = {
        "max_position_embeddings": ORIGINAL,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    plain = tiny_llama(tmp_path / "plain", **sizes, initializer_range=0.2)
    stack = Stack.from_dict({"rope": {"type": kind, "max_position_embeddings": LENGTH}})
    model, tokenizer = load_model(plain, stack)
    scaled = save_checkpoint(model, tokenizer, tmp_path / "scaled", stack)
    ids = torch.randint(5, 260, (LENGTH - 1,), generator=torch.Generator().manual_seed(0))
    llm = {
        "model": str(scaled),
        "dtype": "float32",
        "enforce_eager": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 4096,
    }
    job = {"llm": {**llm, "max_num_seqs": 2}, "prompts": [ids.tolist()], "tokens": 1, "scored": False}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    script, environment = Path(__file__).with_name("engine_jobs.py"), small_engine(tmp_path / "cache")
    [answer] = said(engines().run([script, f"@{tmp_path / 'jobs.json'}"], timeout=1800, environment=environment))
    assert answer["max_model_len"] == LENGTH
    assert answer["peak_mb"] < 6000
    with torch.no_grad():
        expected = model.eval()(ids[None], logits_to_keep=1, use_cache=False).logits[0, -1].log_softmax(-1)
    token = answer["base"]["tokens"][0][0]
    assert token == int(expected.argmax())
    assert answer["base"]["logprobs"][0][0] == pytest.approx(expected[token].item(), abs=2e-4)
