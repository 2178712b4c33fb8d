"""The laws of plugins and of architectures, and a story of a user."""

import pytest
import torch
from arctic_plugins import host_version
from arctic_plugins.testing import ModelSuite, PluginSuite, engines, said, small_engine
from arctic_plugins_huggingface import load_model, register


class TestPlugin(PluginSuite):
    plugin = "acme-0-1-model"
    model = ("acme-0-1-model", {})


class TestModel(ModelSuite):
    model_type = "acme-0-1-model"


SERVE = """
import sys
from arctic_plugins.testing import say
from vllm import LLM, SamplingParams

model = LLM(sys.argv[1], max_model_len=64, enforce_eager=True, dtype="float32")
[answer] = model.generate({"prompt_token_ids": list(range(10, 20))}, SamplingParams(temperature=0, max_tokens=8))
say({"tokens": list(answer.outputs[0].token_ids)})
"""


@pytest.mark.skipif(host_version("vllm") is None, reason="vLLM is not installed")
def test_vllm_generates_the_tokens_of_transformers(tiny_models, tmp_path):
    register()
    checkpoint = tiny_models("acme-0-1-model")
    model, _ = load_model(checkpoint)
    ids = torch.arange(10, 20)[None]
    expected = model.generate(ids, do_sample=False, max_new_tokens=8)[0, 10:].tolist()
    [found] = said(engines().run(["-c", SERVE, checkpoint], environment=small_engine(tmp_path)))
    assert found["tokens"] == expected
