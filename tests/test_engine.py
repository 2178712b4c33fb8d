"""The real vLLM engine on CPU against transformers: the same checkpoint, in float32, must give the same greedy
tokens.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from arctic_plugins_demo.serving import Server
from arctic_plugins_huggingface import load_model, merge_adapter, register, save_checkpoint
from arctic_plugins_huggingface.checkpoints.export import convert_checkpoint, export_checkpoint
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_huggingface.generate import chat_prompt
from arctic_plugins_vllm import on_the_fly
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from arctic_plugins import Stack
from arctic_plugins.provenance import FILE_NAME
from arctic_plugins.resolver import host_version
from arctic_plugins.testing import (
    LLAMA_LIKE,
    MIXTURES,
    draw_adapter,
    engines,
    said,
    small_engine,
    tiny_llama,
    tiny_model,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(host_version("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares the CPU engine"),
]

PROMPTS = [list(range(10, 30)), list(range(40, 47)), [9]]
TOKENS = 24


def run(llm, *, site=None, cache, adapter=None, models=(), tokens=TOKENS, status=0, **environment):
    # vLLM's dtype "auto" would make bfloat16 of a float32 checkpoint (vllm/config/model.py, 0.32.0)
    models = [str(model) for model in models] or [llm["model"]]
    arguments = {key: value for key, value in llm.items() if key != "model"}
    job = {
        "llm": {"max_model_len": 256, "dtype": "float32", **arguments},
        "models": models,
        "prompts": PROMPTS,
        "tokens": tokens,
        "adapter": adapter,
    }
    environment = small_engine(cache, **{"PYTHONPATH": str(site or ""), **environment})
    command = [Path(__file__).with_name("engine.py"), json.dumps(job)]
    return engines().run(command, timeout=900, environment=environment, status=status)


def tokens(result):
    return said(result)[-1]


@torch.no_grad()
def reference(model, logprobs=None, tokens=TOKENS):
    """Greedy tokens by the definition: the whole sequence through the model for every token. Their log-probabilities go
    to ``logprobs``.
    """
    model.eval()
    answers = []
    for prompt in PROMPTS:
        ids, values = list(prompt), []
        for _ in range(tokens):
            distribution = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            ids.append(int(distribution.argmax()))
            values.append(distribution.max().item())
        answers.append(ids[len(prompt) :])
        if logprobs is not None:
            logprobs.append(values)
    return answers


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm-cache")


def trained(checkpoint, plugins, directory):
    """An adapter that says something, saved; and the model it belongs to."""
    stack = Stack.from_dict({**plugins, "lora": {"r": 4, "alpha": 8}})
    model, tokenizer = load_model(checkpoint, stack)
    draw_adapter(model)
    return save_checkpoint(model, tokenizer, directory, stack)


@pytest.fixture(scope="module")
def grouped(tiny_checkpoint, tmp_path_factory):
    stack = Stack.from_dict({"fp8": {"group_size": 64}})  # 176 inputs: a ragged last group
    return save_checkpoint(*load_model(tiny_checkpoint, stack), tmp_path_factory.mktemp("grouped") / "fp8", stack)


def test_the_unmerged_adapter_over_the_encoded_base(grouped, tmp_path, cache):
    adapter = trained(grouped, {"fp8": {"group_size": 64}}, tmp_path / "adapter")
    result = tokens(
        run(
            {"model": str(grouped), "enforce_eager": True, "enable_lora": True, "max_lora_rank": 8},
            cache=cache,
            adapter=str(adapter),
        )
    )
    assert result["base"] == reference(load_model(grouped)[0])
    assert result["adapter"] == reference(load_checkpoint(adapter)[0])
    assert result["adapter"] != result["base"]


def test_two_codecs_merged_and_compiled_with_no_option(tiny_checkpoint, int8_plugin, tmp_path, cache):
    adapter = trained(tiny_checkpoint, {"fp8": {"include": ["**.mlp.*"]}, "int8": {}}, tmp_path / "adapter")
    merged = merge_adapter(adapter, tmp_path / "merged")
    assert tokens(run({"model": str(merged)}, cache=cache, site=int8_plugin))["base"] == reference(
        load_model(merged)[0]
    )


def test_another_codec_unmerged_merged_and_beside_fp8(tiny_checkpoint, tmp_path, cache):
    """An adapter over an nf4 base, and what is merged from nf4 attention and fp8 MLPs; 176 inputs: padded blocks."""
    stack = Stack.from_dict({"bnb": {"type": "nf4"}})
    base = save_checkpoint(*load_model(tiny_checkpoint, stack), tmp_path / "nf4", stack)
    adapter = trained(base, {"bnb": {"type": "nf4"}}, tmp_path / "adapter")
    two = {"fp8": {"include": ["**.mlp.*"]}, "bnb": {"include": ["**.self_attn.*"], "double_quant": True}}
    merged = merge_adapter(trained(tiny_checkpoint, two, tmp_path / "two"), tmp_path / "merged")
    options = {"enforce_eager": True, "enable_lora": True, "max_lora_rank": 8}
    unmerged, mixed = said(run(options, models=[base, merged], cache=cache, adapter=str(adapter)))
    assert unmerged["base"] == reference(load_model(base)[0])
    assert unmerged["adapter"] == reference(load_checkpoint(adapter)[0])
    assert unmerged["adapter"] != unmerged["base"]
    assert mixed["base"] == reference(load_model(merged)[0])


NEW_TOKEN = 262


@torch.no_grad()
def grown(directory):
    """A merged checkpoint with an embedding more than its base, whose token is often the likeliest."""
    stack = Stack.from_dict({"fp8": {}, "lora": {"r": 4}})
    base = tiny_llama(directory / "small", vocab_size=NEW_TOKEN)
    model, tokenizer = load_model(base, stack, new_tokens=["<spare>", "<new>"])
    likeliest = reference(load_model(base)[0], tokens=1)[0][0]
    head = model.get_output_embeddings().token_adapter
    head.trainable_tokens_delta["default"][-1] = 2 * head.base_layer.weight[likeliest]
    adapter = save_checkpoint(model, tokenizer, directory / "adapter", stack)
    return merge_adapter(adapter, directory / "grown")


def test_biases_and_merged_rows_of_new_tokens(tmp_path, cache):
    model, tokenizer = load_model(
        tiny_llama(tmp_path / "biased", attention_bias=True), stack := Stack.from_dict({"fp8": {}})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    checkpoint = save_checkpoint(model, tokenizer, tmp_path / "out", stack)
    models = [checkpoint, grown(tmp_path)]
    results = said(run({"model": str(checkpoint), "enforce_eager": True}, cache=cache, models=models))
    for result, merged in zip(results, models, strict=True):
        assert result["base"] == reference(load_model(merged)[0])
    assert any(NEW_TOKEN in answer for answer in results[-1]["base"])


def test_a_missing_scale_stops_the_engine_with_its_name(grouped, tmp_path, cache):
    damaged = tmp_path / "damaged"
    shutil.copytree(grouped, damaged)
    tensors = load_file(grouped / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    recorded = run({"model": str(damaged), "enforce_eager": True}, cache=cache, status=None)
    assert recorded.returncode != 0
    assert re.search(
        r"CheckpointError: .*damaged/model\.safetensors has \d+ bytes; expected the \d+ that were saved",
        recorded.stderr,
    )
    (damaged / FILE_NAME).unlink()  # as if it had been so when it was saved
    result = run({"model": str(damaged), "enforce_eager": True}, cache=cache, status=None)
    assert result.returncode != 0
    assert "model.layers.1.mlp.gate_up_proj.weight_scale is missing from the checkpoint (1 of 2 parts" in result.stderr


def same_as_transformers(result, models, count=TOKENS, **plugins):
    """Greedy tokens of every model, and their log-probabilities, are those of transformers."""
    served = said(result)
    assert len(served) == len(models)
    for checkpoint, answer in zip(models, served, strict=True):
        logprobs = []
        model, _ = load_model(checkpoint, Stack.from_dict(plugins))
        assert answer["base"] == reference(model, logprobs, count), checkpoint
        torch.testing.assert_close(torch.tensor(answer["logprobs"]), torch.tensor(logprobs), rtol=1e-4, atol=1e-4)


SPLIT = {
    "bits": 8,
    "formats": {
        "**.experts.gate_up_proj": {"bits": 6, "group_size": 64},
        "**.experts.down_proj": {"bits": 12, "group_size": 32},
    },
}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """name -> (plain, encoded): every mixture, with its experts' two weights in formats of their own."""
    directory, stack = tmp_path_factory.mktemp("mixtures"), Stack.from_dict({"fp8": SPLIT})
    made = {}
    for name, (model_type, config) in MIXTURES.items():
        plain = tiny_model(
            directory / name, model_type, **{**config, "intermediate_size": 192, "moe_intermediate_size": 64}
        )
        made[name] = plain, save_checkpoint(*load_model(plain, stack), directory / f"{name}-encoded", stack)
    return made


def test_mixtures_of_experts(mixtures, tmp_path, cache):
    models = [encoded for _, encoded in mixtures.values()]
    for name, options in (("mixtral", {"type": "int8"}), ("olmoe", {"double_quant": True})):
        stack = Stack.from_dict({"bnb": options})
        models.append(save_checkpoint(*load_model(mixtures[name][0], stack), tmp_path / name, stack))
    same_as_transformers(run({"enforce_eager": True}, models=models, cache=cache), models)


@pytest.mark.slow
def test_a_mixture_encoded_on_the_fly_and_compiled(mixtures, cache):
    plain, _ = mixtures["mixtral"]
    overrides = on_the_fly(str(plain), Stack.from_dict({"fp8": SPLIT}))
    same_as_transformers(run({"model": str(plain), "hf_overrides": overrides}, cache=cache), [plain], fp8=SPLIT)


TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": True}
TWO_PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}


@torch.no_grad()
def test_classifiers_and_embeddings(tiny_checkpoint, tmp_path, cache):
    """Of one model with a head and without, in transformers and in vLLM, which needs ``--runner pooling`` for some."""
    fp8, labels = Stack.from_dict({"fp8": {}}), {0: "a", 1: "b", 2: "c"}
    register()
    arctic = tiny_model(
        tmp_path / "plain",
        "arctic",
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_layer_frequency=1,
        parallel_attn_mlp_res=True,
    )
    heads = {"auto_class": AutoModelForSequenceClassification, "id2label": labels}
    bert = tiny_model(
        tmp_path / "plain-bert", "bert", auto_class="AutoModelForMaskedLM", hidden_size=128, num_attention_heads=4
    )
    outside_attention = Stack.from_dict({"fp8": {"exclude": ["**.attention.self.*"]}})
    kinds = {
        "classifier": (tiny_checkpoint, fp8, heads),
        "arctic": (arctic, fp8, heads),
        "bert": (bert, outside_attention, heads),
        "embeddings": (tiny_checkpoint, fp8, {"auto_class": AutoModel}),
        "causal": (tiny_checkpoint, fp8, {}),
    }
    made = {
        name: save_checkpoint(*load_model(checkpoint, stack, **options), tmp_path / name, stack)
        for name, (checkpoint, stack, options) in kinds.items()
    }
    found = said(run({"enforce_eager": True, "runner": "pooling"}, models=made.values(), cache=cache))
    for (name, checkpoint), result in zip(made.items(), found, strict=True):
        model, _ = load_model(checkpoint)
        for prompt, vector in zip(PROMPTS, result["pooled"], strict=True):
            ids = torch.tensor([prompt])
            if kinds[name][2] is heads:
                expected = model(ids).logits[0].softmax(-1)
            else:
                expected = torch.nn.functional.normalize(model.base_model(ids).last_hidden_state[0, -1], dim=-1)
            torch.testing.assert_close(torch.tensor(vector), expected, rtol=1e-4, atol=1e-5, msg=name)


def test_tensor_parallel_on_two_processes(tiny_checkpoint, mixtures, tmp_path, cache, traced):
    """Each has half of every layer, and half of every expert; in the first model one of nf4's two blocks per row. All
    of vLLM's processes have registered the plugins, although they are forks.
    """
    variables, trace = traced
    stack = Stack.from_dict({"bnb": {"include": ["**.self_attn.*"], "double_quant": True}})
    models = [save_checkpoint(*load_model(tiny_checkpoint, stack), tmp_path / "out", stack), mixtures["mixtral"][1]]
    same_as_transformers(run(TWO, models=models, cache=cache, tokens=8, **TWO_PROCESSES, **variables), models, count=8)
    main = next(process["pid"] for process in trace() if process["how"] == "register")
    forks = [process for process in trace() if process["how"] == "fork"]
    assert all(process["registered"] for process in forks)
    engines = [process["pid"] for process in forks if process["parent"] == main]
    assert any([process["parent"] for process in forks].count(engine) == 2 for engine in engines)  # its workers


@pytest.mark.slow
def test_experts_on_two_processes(mixtures, cache):
    """Expert parallel: each has half of the experts."""
    plain, _ = mixtures["mixtral"]
    overrides = on_the_fly(str(plain), Stack.from_dict({"fp8": SPLIT}))
    options = {"model": str(plain), "hf_overrides": overrides, "enable_expert_parallel": True, **TWO}
    same_as_transformers(run(options, cache=cache, tokens=8, **TWO_PROCESSES), [plain], count=8, fp8=SPLIT)


def exported(directory, model_type, stack, format_name, **config):
    plain = tiny_model(directory / "plain", model_type, **config)
    save_checkpoint(*load_model(plain, stack), directory / "encoded", stack)
    return export_checkpoint(directory / "encoded", directory / "exported", format_name)


def test_deepspeedfp_is_read_as_it_is_converted(tmp_path, cache):
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": 1,
    }
    stack, models, converted = Stack.from_dict({"fp8": {"group_size": 512}}), [], []
    for model_type, config in (("llama", {}), MIXTURES["mixtral"]):
        models.append(exported(tmp_path / model_type, model_type, stack, "deepspeedfp", **{**config, **sizes}))
        converted.append(tmp_path / model_type / "converted")
        convert_checkpoint(models[-1], converted[-1], "deepspeedfp")
    same_as_transformers(run({"enforce_eager": True}, models=models, cache=cache), converted)


NEEDS_AMX = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(),
    reason="vLLM's only CPU kernel for fp8 blocks needs AMX (kernels/linear/scaled_mm/cpu.py, 0.32.0)",
)
BLOCKS = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_name", "dtype", "tolerance"),
    [pytest.param("fp8-block", "bfloat16", 0.1, marks=NEEDS_AMX), ("compressed-tensors", "float32", 1e-3)],
)
def test_stock_vllm_reads_what_is_exported(tmp_path, cache, format_name, dtype, tolerance):
    """Without this project: no plugin is loaded. vLLM 0.32 computes fp8 blocks in bfloat16 only, has on CPU no kernel
    for compressed-tensors of which the weights alone are fp8, and none for such experts."""
    stack = Stack.from_dict({"fp8": {"activations": "fp8"} if format_name == "compressed-tensors" else {}})
    kinds = {"llama": {}, **({"mixtral": MIXTURES["mixtral"][1]} if format_name == "fp8-block" else {})}
    models = [
        exported(tmp_path / kind, kind, stack, format_name, **{**config, **BLOCKS, "initializer_range": 0.05})
        for kind, config in kinds.items()
    ]
    result = run({"enforce_eager": True, "dtype": dtype}, models=models, cache=cache, VLLM_PLUGINS="none")
    for checkpoint, answer in zip(models, said(result), strict=True):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        for prompt, ids, logprobs in zip(PROMPTS, answer["base"], answer["logprobs"], strict=True):
            with torch.no_grad():
                distribution = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            expected = distribution[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert expected.median() > -4  # of 272 tokens: these are not anybody's tokens
            assert (torch.tensor(logprobs) - expected).abs().median() < tolerance


def test_vllms_own_kernels_answer_as_for_the_exported_checkpoint(tmp_path, cache):
    """Layers handed to vLLM's kernels (integrations/vllm/tests/test_native.py), compiled, and with an adapter."""
    fp8 = {"fp8": {"activations": "fp8"}}  # the only 8-bit weights for which vLLM has a kernel on CPU
    exported_to = exported(tmp_path, "llama", Stack.from_dict(fp8), "compressed-tensors", **BLOCKS)
    adapter, models = trained(tmp_path / "encoded", fp8, tmp_path / "adapter"), [tmp_path / "encoded", exported_to]
    # One prompt at a time: which ones are computed together differs from run to run, and rounding magnifies it.
    options = {"enable_lora": True, "max_lora_rank": 8, "max_num_seqs": 1}
    result = run(options, models=models, cache=cache, adapter=str(adapter), ARCTIC_VLLM_KERNELS="native")
    found, expected = said(result)
    # Tokens of the base and with the adapter, and log-probabilities to the bit, which the codec would not give.
    assert found == expected
    assert found["adapter"] != found["base"]


def test_arctic_serve_answers_over_http_with_the_adapter_and_with_its_base(grouped, tmp_path, cache, monkeypatch):
    adapter = trained(grouped, {"fp8": {"group_size": 64}}, tmp_path / "adapter")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(cache))
    options = ("--base", str(grouped), "--enforce-eager", "--dtype", "float32", "--max-model-len", "256")
    with Server(adapter, tmp_path / "log", options=options) as server:
        answers = {name: server.chat("hello", max_tokens=8, model=name)[1] for name in ("adapter", str(grouped))}
    for name, (model, tokenizer) in {"adapter": load_checkpoint(adapter), str(grouped): load_model(grouped)}.items():
        prompt = tokenizer(chat_prompt(tokenizer, "hello"), return_tensors="pt", add_special_tokens=False)
        tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
        assert answers[name] == tokens
    assert answers["adapter"] != answers[str(grouped)]


@pytest.mark.slow
def test_every_relative_of_llama_serves_what_was_trained(train_relative, cache):
    """Ten architectures: quantized, trained, merged, served with no option. See arctic_plugins/testing/models.py for
    what each adds.
    """
    merged = [train_relative(name)[2] for name in LLAMA_LIKE]
    served = said(run({"enforce_eager": True, "max_num_seqs": 4}, models=merged, cache=cache))
    assert len(served) == len(LLAMA_LIKE)
    for name, checkpoint, answer in zip(LLAMA_LIKE, merged, served, strict=True):
        logprobs = []
        model, _ = load_model(
            checkpoint, attn_implementation="eager"
        )  # transformers' sdpa leaves Gemma 2's soft caps out; vLLM does not
        assert answer["base"] == reference(model, logprobs), name
        torch.testing.assert_close(torch.tensor(answer["logprobs"]), torch.tensor(logprobs), rtol=1e-4, atol=1e-4)
