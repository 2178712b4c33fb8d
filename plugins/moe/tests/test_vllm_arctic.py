"""Snowflake Arctic in the real vLLM engine on CPU, in float32, against its equations."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from arctic_plugins_huggingface import load_model, register, save_checkpoint
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_vllm import on_the_fly
from arctic_plugins_vllm.serving import server_options
from safetensors.torch import load_file
from transformers import AutoConfig

from arctic_plugins import Stack
from arctic_plugins.resolver import host_version
from arctic_plugins.testing import draw_adapter, engines, run_python, said, small_engine, tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(host_version("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares the CPU engine"),
]

PROMPTS = [list(range(10, 58)), list(range(40, 47)), [9, 3]]
TOKENS = 12
ARCTIC = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_layer_frequency": 1,
    "parallel_attn_mlp_res": True,
    "intermediate_size": 96,
}
LORA = {"enable_lora": True, "max_lora_rank": 8}
SCALES = {"initializer_range": 0.2, "rope_theta": 1e4}


def arctic(directory, **changes):
    return tiny_model(directory, "arctic", **{**ARCTIC, **SCALES, **changes})


def run(jobs, cache, status=0, **environment):
    defaults = {"max_model_len": 256, "dtype": "float32", "enforce_eager": True}
    jobs = [
        {
            "prompts": PROMPTS,
            "tokens": TOKENS,
            **job,
            "llm": {**defaults, **job["llm"], "model": str(job["llm"]["model"])},
        }
        for job in jobs
    ]
    script = Path(__file__).parents[3] / "tests" / "engine_jobs.py"
    environment = small_engine(cache, **environment)
    return engines().run([script, json.dumps(jobs)], timeout=900, environment=environment, status=status)


@pytest.fixture
def by_equations(equations):
    return lambda checkpoint: equations(
        AutoConfig.from_pretrained(checkpoint), load_file(checkpoint / "model.safetensors")
    )


def by_transformers(model):
    model.eval()
    return lambda ids: model(torch.tensor([ids])).logits[0].float()


@torch.no_grad()
def same(answer, logits_of, prompts=PROMPTS):
    """Every token is the best one, and its log-probability and those of the prompt are right to 1e-4."""
    for at, prompt in enumerate(prompts):
        ids = prompt + answer["tokens"][at]
        distribution = logits_of(ids).log_softmax(-1)[:-1]
        assert distribution[len(prompt) - 1 :].argmax(-1).tolist() == answer["tokens"][at]
        expected = distribution.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        found = torch.tensor(
            (answer["prompt"][at] if answer["prompt"] else expected[: len(prompt) - 1].tolist())
            + answer["logprobs"][at]
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm-cache")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A dense layer and a hybrid one, twice."""
    return arctic(tmp_path_factory.mktemp("arctic") / "plain", moe_layer_frequency=2, num_hidden_layers=4)


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_kind_of_layer_is_that_of_the_equations(half, by_equations, tmp_path, cache):
    """All sixteen; one half already has every three of the four choices together."""
    models = []
    for choice in itertools.product((0, 1), repeat=4):
        if sum(choice) % 2 != half:
            continue
        frequency, hybrid, top_k, kv_heads = 1 + choice[0], bool(choice[1]), 1 + choice[2], 4 - 2 * choice[3]
        changes = {
            "moe_layer_frequency": frequency,
            "parallel_attn_mlp_res": hybrid,
            "num_experts_per_tok": top_k,
            "num_key_value_heads": kv_heads,
        }
        models.append(arctic(tmp_path / str(len(models)), **changes, tie_word_embeddings=len(models) == 5))
    assert len(models) == 8
    for checkpoint, answer in zip(
        models, said(run([{"llm": {"model": model}} for model in models], cache)), strict=True
    ):
        same(answer["base"], by_equations(checkpoint))


def with_adapter(checkpoint, plugins, directory, targets):
    """An adapter that changes what is said, saved."""
    stack = Stack.from_dict({**plugins, "lora": {"r": 4, "alpha": 8, "target_modules": targets}})
    model, tokenizer = load_model(checkpoint, stack)
    draw_adapter(model)
    return save_checkpoint(model, tokenizer, directory, stack)


@pytest.fixture(scope="module")
def encoded(plain, tmp_path_factory):
    stack = Stack.from_dict({"fp8": {}})
    return save_checkpoint(*load_model(plain, stack), tmp_path_factory.mktemp("arctic") / "fp8", stack)


def test_caches_chunks_encoded_weights_and_adapters(plain, encoded, by_equations, tmp_path, cache):
    """Four engines: a prompt that comes in chunks, and again from the prefix cache; fp8 made before and while loading;
    adapters over both, on attention and on MLPs that are no experts."""
    attention, mlps = [f"{name}_proj" for name in "qkvo"], ["w1", "w2", "w3"]
    on_plain = with_adapter(plain, {}, tmp_path / "plain", attention)
    on_encoded = with_adapter(encoded, {"fp8": {}}, tmp_path / "encoded", attention + mlps)
    long = [list(range(5, 205))]
    overrides = on_the_fly(str(plain), Stack.from_dict({"fp8": {}}))
    chunks = {
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 4,
        "enable_prefix_caching": True,
        "block_size": 32,
    }
    jobs = [
        {"llm": {"model": plain, **chunks}, "prompts": long, "twice": True},
        {"llm": {"model": plain, **LORA, "lora_target_modules": attention}, "adapter": str(on_plain)},
        {"llm": {"model": encoded, **LORA, "lora_target_modules": attention + mlps}, "adapter": str(on_encoded)},
        {"llm": {"model": plain, "hf_overrides": overrides}},
    ]
    chunked, lora, stored, encoding = said(run(jobs, cache))
    exact, fp8 = by_equations(plain), by_transformers(load_model(encoded)[0])
    for answer in ("base", "again", "cached"):
        same(chunked[answer], exact, long)
    assert chunked["cached"]["cached"][0] >= 128
    same(lora["base"], exact)
    same(lora["adapter"], by_transformers(load_checkpoint(on_plain)[0]))
    assert lora["adapter"]["tokens"] != lora["base"]["tokens"]
    same(stored["base"], fp8)
    same(stored["adapter"], by_transformers(load_checkpoint(on_encoded)[0]))
    assert stored["adapter"]["tokens"] != stored["base"]["tokens"] != lora["base"]["tokens"]
    same(encoding["base"], fp8)


MANY = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def test_two_processes_share_layers_or_experts(plain, encoded, by_equations, cache):
    jobs = [
        {"llm": {"model": plain, **TWO}, "tokens": 4},
        {"llm": {"model": encoded, **TWO, "enable_expert_parallel": True}, "tokens": 4},
    ]
    halves, experts = said(run(jobs, cache, **MANY))
    same(halves["base"], by_equations(plain))
    same(experts["base"], by_transformers(load_model(encoded)[0]))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (
            {},
            {**TWO, "enable_expert_parallel": True},
            "block_sparse_moe: vLLM 0.32 cannot spread plain experts over processes on CPU; expected encoded",
        ),
        (
            {"num_key_value_heads": 3, "num_attention_heads": 6, "hidden_size": 192},
            TWO,
            "6 attention heads and 3 key-value heads cannot be split over 2 processes; expected a divisor",
        ),
        (
            {},
            {"enable_lora": True},
            "vLLM 0.32 cannot compute adapters of experts on CPU; expected adapters of other modules; name these",
        ),
        ({"hidden_act": "gelu"}, {}, "hidden_act is 'gelu'; expected 'silu'"),
    ],
    ids=["experts", "heads", "adapters", "activation"],
)
def test_what_would_crash_or_be_wrong_is_refused(tmp_path, cache, sizes, options, message):
    environment = MANY if "tensor_parallel_size" in options else {}
    result = run(
        [{"llm": {"model": arctic(tmp_path / "model", **sizes), **options}}], cache, status=None, **environment
    )
    assert result.returncode > 0
    assert message in result.stdout + result.stderr  # processes of the engine say it on standard output


@pytest.mark.slow
def test_compiled_in_one_process_and_in_two_stages(plain, encoded, by_equations, cache):
    """Pipeline stages are compiled: in eager mode vLLM 0.32 itself stops with them on CPU, with every model."""
    whole, fp8 = said(run([{"llm": {"model": model, "enforce_eager": False}} for model in (plain, encoded)], cache))
    same(whole["base"], by_equations(plain))
    same(fp8["base"], by_transformers(load_model(encoded)[0]))
    stages = {"model": plain, "enforce_eager": False, "pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    [answer] = said(run([{"llm": stages}], cache, **MANY))
    same(answer["base"], by_equations(plain))


def test_an_adapter_is_served_without_adapters_of_experts(encoded, tmp_path):
    adapter = with_adapter(encoded, {"fp8": {}}, tmp_path / "adapter", ["q_proj", "v_proj"])
    values, _ = server_options(str(adapter), base=str(encoded))
    assert values["lora_target_modules"] == ["q_proj", "v_proj"]


def test_vllm_finds_config_and_tokenizer(plain, tmp_path):
    """In a process that knows nothing but vLLM's entry point; transformers' own classes of models come later and still
    work.
    """
    saved = json.loads((plain / "tokenizer_config.json").read_text())
    shutil.copytree(plain, tmp_path / "arctic")
    released = {
        "tokenizer_class": "ArcticTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_arctic.ArcticTokenizer", None]},
    }
    (tmp_path / "arctic" / "tokenizer_config.json").write_text(json.dumps({**saved, **released}))
    code = f"""
from arctic_plugins_vllm import register
register(), register()
from transformers import AutoConfig, AutoTokenizer
from vllm import ModelRegistry
config = AutoConfig.from_pretrained({str(tmp_path / "arctic")!r})
print(type(config), type(AutoTokenizer.from_pretrained({str(tmp_path / "arctic")!r})))
print(ModelRegistry.models["ArcticForCausalLM"].module_name)
from arctic_plugins_huggingface import load_model
print(type(load_model({str(plain)!r})[0]))
"""
    result = run_python("-c", code)
    kinds = ["configuration.ArcticConfig", "tokenization.ArcticTokenizer", "vllm", "hf.ArcticForCausalLM"]
    assert all(f"arctic_plugins_moe.{kind}" in result.stdout for kind in kinds), result.stdout


def test_vllm_is_told_what_the_model_can_do_and_of_its_experts(plain):
    from arctic_plugins_vllm.sharding import built_as_rank
    from vllm.model_executor.models.interfaces import is_mixture_of_experts, supports_lora, supports_pp

    with built_as_rank(plain, 0, 1) as (model, _):
        assert is_mixture_of_experts(model)
        assert supports_lora(model)
        assert supports_pp(model)
        counts = (
            model.num_moe_layers,
            model.num_logical_experts,
            model.num_physical_experts,
            model.num_local_physical_experts,
        )
        assert counts == (2, 4, 4, 4)
        updated = []
        for experts in model.moe_layers:  # of which vLLM has a map only where experts are spread
            experts.update_expert_map = lambda: updated.append(1)
        model.update_physical_experts_metadata(6, 3)
        assert len(updated) == 2
        counts = (
            model.num_logical_experts,
            model.num_physical_experts,
            model.num_local_physical_experts,
            model.num_redundant_experts,
        )
        assert counts == (4, 6, 3, 2)
