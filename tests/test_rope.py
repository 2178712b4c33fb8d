"""Scaled models say the same in transformers and in the real vLLM engine, which is told nothing but the checkpoint."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from arctic_plugins_huggingface import load_model, merge_adapter, register, save_checkpoint
from arctic_plugins_huggingface.loading.config import load_config

from arctic_plugins import Stack
from arctic_plugins.errors import PluginError
from arctic_plugins.resolver import host_version
from arctic_plugins.testing import LLAMA_LIKE, run_python, said, small_engine, tiny_llama, tiny_model

ORIGINAL, LENGTH, DIM = 64, 256, 32
OWN = """
import torch
from arctic_plugins import Plugin, hookimpl

class plugin(Plugin):
    name = "half"

    @classmethod
    @hookimpl
    def register(cls, registry):
        registry.rope_type("{name}", "half_plugin:frequencies")

def frequencies(parameters, dim):
    plain = 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return plain / parameters["factor"] ** parameters["exponent"], 1.25
"""
ROPES = {
    "linear": {},
    "ntk": {},
    "yarn": {},
    "llama3": {},
    "dynamic": {},
    "longrope": {"long_factor": [1.0 + i for i in range(DIM // 2)], "attention_factor": 1.1},
    "half": {"parameters": {"exponent": 0.5}},
}


@pytest.mark.vllm
@pytest.mark.skipif(host_version("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares the CPU engine")
def test_texts_of_the_new_length_are_the_same_in_both_hosts(tmp_path, install_plugin):
    site = install_plugin("half", OWN.format(name="half"))
    from arctic_plugins_huggingface.loading.rope import register_rope_types
    from arctic_plugins_vllm import on_the_fly

    register()
    register_rope_types()
    sizes = {"max_position_embeddings": ORIGINAL, "head_dim": DIM, "initializer_range": 0.2}
    llama = tiny_llama(tmp_path / "llama", **sizes)
    gemma = tiny_model(tmp_path / "gemma", *LLAMA_LIKE["gemma3"][:1], **{**LLAMA_LIKE["gemma3"][1], **sizes})
    ids = torch.randint(5, 200, (LENGTH - 1,), generator=torch.Generator().manual_seed(0)).tolist()
    models = {}
    for name, checkpoint, options in [
        *((name, llama, own) for name, own in ROPES.items()),
        ("gemma", gemma, {"type": "yarn"}),
    ]:
        stack = Stack.from_dict({"rope": {"type": name, "max_position_embeddings": LENGTH, **options}})
        model, tokenizer = load_model(checkpoint, stack, attn_implementation="eager")
        models[name] = model.eval(), save_checkpoint(model, tokenizer, tmp_path / "scaled" / name, stack)
    jobs = [{"llm": {"model": str(path)}} for _, path in models.values()]
    stack = Stack.from_dict({"rope": {"type": "yarn", "max_position_embeddings": LENGTH}})
    jobs.append({"llm": {"model": str(llama), "hf_overrides": on_the_fly(str(llama), stack)}})
    jobs = [
        {"llm": {**job["llm"], "dtype": "float32", "enforce_eager": True}, "prompts": [ids], "tokens": 1}
        for job in jobs
    ]
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    # Not in a fork: types of plugins have to be known before vLLM's models are imported.
    script, environment = Path(__file__).with_name("engine_jobs.py"), small_engine(tmp_path / "cache", PYTHONPATH=paths)
    answers = said(run_python(script, jobs, timeout=900, environment=environment))
    assert len(answers) == len(jobs)
    while_loading = answers.pop()
    assert while_loading["max_model_len"] == LENGTH
    assert while_loading["base"]["prompt"] == answers[list(models).index("yarn")]["base"]["prompt"]
    texts = set()
    for (name, (model, _)), answer in zip(models.items(), answers, strict=True):
        assert answer["max_model_len"] == LENGTH, name
        whole = ids + answer["base"]["tokens"][0]  # of the maximum length, where also those agree that look at it
        with torch.no_grad():
            expected = (
                model(torch.tensor([whole]))
                .logits[0]
                .log_softmax(-1)[:-1]
                .gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
            )
        found = torch.tensor(answer["base"]["prompt"][0] + answer["base"]["logprobs"][0])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
        texts.add(tuple(round(value, 3) for value in answer["base"]["prompt"][0][-8:]))
    assert len(texts) == len(models), "every type says something else"


@pytest.mark.skipif(host_version("vllm") is None, reason="vLLM is not installed")
def test_an_adapter_is_served_over_a_scaled_base(tmp_path):
    """Its base is not scaled, and the server is told."""
    from arctic_plugins_vllm.serving import server_options

    llama = tiny_llama(tmp_path / "llama", max_position_embeddings=ORIGINAL)
    stack = Stack.from_dict({"rope": {"type": "llama3", "max_position_embeddings": LENGTH}, "lora": {"r": 2}})
    model, tokenizer = load_model(llama, stack)
    adapter = save_checkpoint(model, tokenizer, tmp_path / "adapter", stack)
    values, _ = server_options(str(adapter), base=str(llama))
    assert values["hf_overrides"] == {
        "rope_parameters": model.config.rope_parameters,
        "max_position_embeddings": LENGTH,
        "arctic_rope": True,
    }
    merged = merge_adapter(adapter, tmp_path / "merged")
    assert load_config(merged).rope_parameters == model.config.rope_parameters
    assert load_config(merged).max_position_embeddings == LENGTH


def test_a_name_that_transformers_would_take_for_another_kind_is_refused(install_plugin):
    from arctic_plugins_huggingface.loading.rope import register_rope_types

    install_plugin("half", OWN.format(name="my_dynamic"))
    with pytest.raises(PluginError, match="RoPE type 'my_dynamic' is registered; expected a name without 'dynamic'"):
        register_rope_types()


@pytest.mark.parametrize("kind", ["dynamic", "ntk"])
def test_models_that_are_not_ours_get_vllms_own_scaling(kind, monkeypatch, tmp_path):
    """Installing the integration changes none of them."""
    from arctic_plugins_vllm import compat
    from arctic_plugins_vllm import rope as ours
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding

    stock = rotary_embedding.get_rope
    stock = getattr(stock, "__wrapped__", stock)
    wrapped = partial(ours.get_rope, stock)
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    with set_current_vllm_config(VllmConfig()):
        expected, found = (get(64, 128, True, parameters, torch.float32).cos_sin_cache for get in (stock, wrapped))
        assert torch.equal(found, expected)
        monkeypatch.setattr(ours, "says", lambda key: key == "arctic_rope")
        assert wrapped(64, 128, True, parameters, torch.float32).cos_sin_cache.shape[0] >= 256
        monkeypatch.setattr(ours, "says", compat.says)
        (tmp_path / "arctic_plugins.json").touch()  # of an earlier version
        monkeypatch.setattr(ours, "loading", lambda: (str(tmp_path), 1, False))
        assert wrapped(64, 128, True, parameters, torch.float32).cos_sin_cache.shape[0] >= 256
