"""Frequencies of both hosts against the papers' formulas, and what stands in the config for it."""

import logging
import math

import pytest
import torch
from arctic_plugins_huggingface import load_model, register, save_checkpoint
from arctic_plugins_huggingface.loading.config import load_config
from transformers import AutoModelForCausalLM

from arctic_plugins import Stack
from arctic_plugins.errors import ConfigError
from arctic_plugins.resolver import host_version
from arctic_plugins.testing import LLAMA_LIKE, tiny_llama, tiny_model

ORIGINAL, FACTOR, THETA, DIM = 512, 8, 10000.0, 32
LONG = tuple(1.0 + 0.5 * i for i in range(DIM // 2))
OPTIONS = {
    "linear": {},
    "dynamic": {},
    "ntk": {},
    "mixed ntk": {"type": "ntk", "mixed_b": 0.625},
    "yarn": {},
    "yarn as told": {"type": "yarn", "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.1, "truncate": False},
    "llama3": {},
    "llama3 as told": {"type": "llama3", "low_freq_factor": 2, "high_freq_factor": 8, "rope_theta": 5e5},
    "longrope": {"long_factor": LONG},
    "longrope as told": {"type": "longrope", "long_factor": LONG, "attention_factor": 1.3},
}


def options(name, **changes):
    return {"rope": {"type": name, "max_position_embeddings": FACTOR * ORIGINAL, **OPTIONS[name], **changes}}


def plain(theta=THETA):
    return [theta ** (-2 * i / DIM) for i in range(DIM // 2)]


def yarn(beta_fast=32, beta_slow=1, truncate=True):
    """Peng et al., 2023, section 3.2: by the number of turns within the original length, gamma goes from 0 to 1."""

    def dimension(turns):
        return DIM * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, DIM - 1)
    gammas = [1 - min(max((i - low) / (high - low), 0), 1) for i in range(DIM // 2)]
    return [f * (gamma + (1 - gamma) / FACTOR) for f, gamma in zip(plain(), gammas, strict=True)]


def llama3(low=1, high=4, theta=THETA):
    """Llama 3.1's reference code, ``apply_scaling``."""
    found = []
    for frequency in plain(theta):
        wavelength = 2 * math.pi / frequency
        if wavelength < ORIGINAL / high:
            found.append(frequency)
        elif wavelength > ORIGINAL / low:
            found.append(frequency / FACTOR)
        else:
            smooth = (ORIGINAL / wavelength - low) / (high - low)
            found.append((1 - smooth) * frequency / FACTOR + smooth * frequency)
    return found


def mixed(b):
    a = math.log(FACTOR) / (DIM / 2) ** b
    return [f / math.exp(a * (i + 1) ** b) for i, f in enumerate(plain())]


USUAL = math.sqrt(1 + math.log(FACTOR) / math.log(ORIGINAL))
EXPECTED = {
    "linear": ([f / FACTOR for f in plain()], 1),
    "dynamic": (
        plain(THETA * (FACTOR * FACTOR - (FACTOR - 1)) ** (DIM / (DIM - 2))),
        1,
    ),  # of a text of the maximum length
    "ntk": ([f / FACTOR ** ((2 * i + 2) / DIM) for i, f in enumerate(plain())], 1),
    "mixed ntk": (mixed(0.625), 1),
    "yarn": (yarn(), 0.1 * math.log(FACTOR) + 1),
    "yarn as told": (yarn(16, 2, truncate=False), 1.1),
    "llama3": (llama3(), 1),
    "llama3 as told": (llama3(2, 8, 5e5), 1),
    "longrope": ([f / divisor for f, divisor in zip(plain(), LONG, strict=True)], USUAL),
    "longrope as told": ([f / divisor for f, divisor in zip(plain(), LONG, strict=True)], 1.3),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    register()
    return tiny_llama(
        tmp_path_factory.mktemp("llama") / "plain", max_position_embeddings=ORIGINAL, rope_theta=THETA, head_dim=DIM
    )


def in_transformers(config, length):
    """Angles and factor of a position, from cosines and sines: position 1 turns every frequency by itself."""
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.tensor([[1, length - 1]]))
    return torch.atan2(sin, cos)[0, 0, : DIM // 2], torch.hypot(sin, cos)[0, 0, : DIM // 2]


def in_vllm(config, length):
    from arctic_plugins_vllm import rope
    from arctic_plugins_vllm.compat import rotary_embedding, set_current_vllm_config
    from vllm.config import ModelConfig, VllmConfig

    rope.install()
    vllm_config = VllmConfig()
    vllm_config.model_config = ModelConfig.__new__(ModelConfig)
    vllm_config.model_config.max_model_len = length
    vllm_config.model_config.hf_config = config
    with set_current_vllm_config(vllm_config):
        found = rotary_embedding.get_rope(
            DIM, config.max_position_embeddings, True, config.rope_parameters, torch.float32
        )
    cache = (
        found.long_short_cos_sin_cache[ORIGINAL:]
        if config.rope_parameters["rope_type"] == "longrope"
        else found.cos_sin_cache
    )
    assert len(cache) >= length, "every position of the longest text"
    cos, sin = cache[1].chunk(2)
    return torch.atan2(sin, cos), torch.hypot(sin, cos)


@pytest.mark.parametrize("name", EXPECTED)
def test_hosts_and_formula_agree(llama, name, caplog):
    config = load_config(llama)
    stack = Stack.from_dict(options(name))
    stack.hf_configure_model(config)
    with caplog.at_level(logging.WARNING, "transformers"):
        config.validate_rope()
    assert "short_mscale" in caplog.text if name == "longrope as told" else not caplog.records
    hosts = [in_transformers(config, FACTOR * ORIGINAL)]
    if host_version("vllm") is not None:
        hosts.append(in_vllm(config, FACTOR * ORIGINAL))
    frequencies, scaling = EXPECTED[name]
    for angles, factors in hosts:
        torch.testing.assert_close(
            angles.double(), torch.tensor(frequencies, dtype=torch.float64), rtol=1e-6, atol=1e-7
        )
        torch.testing.assert_close(factors.double(), torch.full_like(factors, scaling).double(), rtol=1e-6, atol=0)


def test_a_checkpoint_keeps_it(llama, tmp_path):
    stack = Stack.from_dict(options("yarn"))
    model, tokenizer = load_model(llama, stack)
    save_checkpoint(model, tokenizer, tmp_path / "scaled", stack)
    again, _ = load_model(tmp_path / "scaled")
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert not torch.allclose(load_model(llama)[0](ids).logits, model(ids).logits, atol=1e-3)
    assert again.config.max_position_embeddings == FACTOR * ORIGINAL
    same, _ = load_model(tmp_path / "scaled", stack)  # the same recipe over what it made
    assert same.config.rope_parameters == model.config.rope_parameters


def test_layers_with_a_window_are_left_alone(tmp_path):
    model_type, sizes = LLAMA_LIKE["gemma3"]
    checkpoint = tiny_model(tmp_path / "gemma3", model_type, **sizes, max_position_embeddings=ORIGINAL)
    before = load_config(checkpoint).rope_parameters
    model, _ = load_model(checkpoint, Stack.from_dict(options("yarn")))
    after = model.config.rope_parameters
    assert after["sliding_attention"] == before["sliding_attention"]
    assert after["full_attention"]["rope_type"] == "yarn"
    assert after["full_attention"]["rope_theta"] == before["full_attention"]["rope_theta"]
    Stack.from_dict(options("ntk")).hf_configure_model(config := load_config(checkpoint))
    assert config.max_position_embeddings == FACTOR * ORIGINAL, "vLLM does not multiply that of Gemma 3"
    stack = Stack.from_dict(options("yarn", layer_types=["sliding_attention"]))
    stack.hf_configure_model(config := load_config(checkpoint))
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "yarn"
    for wrong, message in [
        (options("yarn", layer_types=["full"]), r"layer_types names 'full'; expected some of .*full_attention"),
        (options("dynamic"), "layers of gemma3_text differ"),
        (options("yarn", truncate=False), "transformers would ignore the option"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Stack.from_dict(wrong).hf_configure_model(load_config(checkpoint))


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"type": "yarm", "factor": 4}, "type is 'yarm'; expected one of .*did you mean 'yarn'"),
        ({"type": "yarn"}, "neither max_position_embeddings nor factor"),
        ({"type": "yarn", "factor": 0.5}, r"plugins\.rope\.factor is 0.5"),
        (
            {"type": "yarn", "max_position_embeddings": 256},
            "is 256, but the model was trained with 512; expected a larger",
        ),
        (
            {"type": "yarn", "factor": 2, "max_position_embeddings": 4096},
            "factor 2 times 512 is 1024, but max_.* 4096; expected at most",
        ),
        ({"type": "linear", "factor": 2, "max_position_embeddings": 4096}, "expected the same"),
        (
            {"type": "llama3", "factor": 4, "beta_fast": 3},
            "beta_fast is set, but type 'llama3' does not use it; expected type yarn",
        ),
        ({"type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 2}, "expected beta_fast > beta_slow"),
        ({"type": "llama3", "factor": 4, "high_freq_factor": 1}, "expected high_freq_factor > low_freq_factor"),
        ({"type": "longrope", "factor": 4}, "long_factor is missing; expected 16 divisors"),
        ({"type": "longrope", "factor": 4, "long_factor": [1, 2]}, "long_factor has 2 numbers; expected 16"),
        ({"type": "ntk", "factor": 4, "parameters": {"a": 1}}, "parameters is set, but type 'ntk' does not use it"),
        ({"type": "ntk", "factor": 4, "layer_types": ["full_attention"]}, "all layers of llama have the same RoPE"),
        ({"factor": 4}, r"plugins\.rope\.type is missing"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_said(llama, rope, message):
    with pytest.raises(ConfigError, match=message):
        Stack.from_dict({"rope": rope}).hf_configure_model(load_config(llama))


def test_a_model_that_is_scaled_already(llama):
    config = load_config(llama)
    Stack.from_dict(options("llama3")).hf_configure_model(config)
    with pytest.raises(ConfigError, match=r"already scaled \(llama3, max_position_embeddings 4096\)"):
        Stack.from_dict(options("yarn")).hf_configure_model(config)
    Stack.from_dict(options("yarn", original_max_position_embeddings=ORIGINAL)).hf_configure_model(config)
    assert config.rope_parameters["factor"] == FACTOR


def test_a_model_without_rotation(tmp_path):
    checkpoint = tiny_model(tmp_path / "gpt2", "gpt2", n_layer=1, n_head=2, n_embd=32)
    with pytest.raises(ConfigError, match="gpt2 has no rotary position embeddings"):
        Stack.from_dict(options("yarn")).hf_configure_model(load_config(checkpoint))


def test_what_follows_the_length_of_the_text_is_said(llama, caplog):
    for name, text in (
        ("dynamic", "below 4096 tokens their results differ"),
        ("longrope", "short_factor up to 512 tokens"),
    ):
        with caplog.at_level(logging.WARNING):
            load_model(llama, Stack.from_dict(options(name)))
        assert text in caplog.text
