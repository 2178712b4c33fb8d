"""Arctic in transformers: exact against its equations, Snowflake's names both ways, and what any model there can do."""

import itertools
import json

import pytest
import torch
import transformers
from arctic_plugins_huggingface import load_model, register, save_checkpoint
from arctic_plugins_huggingface.loading import head_modules
from arctic_plugins_moe.configuration import ArcticConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from arctic_plugins import Stack
from arctic_plugins.errors import CheckpointError
from arctic_plugins.testing import run_python, tiny_model

IDS = torch.randint(0, 128, (24,), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_layer_frequency": 1,
    "parallel_attn_mlp_res": True,
    "rope_theta": 1e4,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def build(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(ArcticConfig(**{**SIZES, **changes}))


@pytest.mark.parametrize(
    ("frequency", "hybrid", "top_k", "kv_heads"), itertools.product((1, 2), (True, False), (1, 2), (4, 2))
)
def test_logits_are_those_of_the_equations(tmp_path, equations, frequency, hybrid, top_k, kv_heads):
    changes = {
        "moe_layer_frequency": frequency,
        "parallel_attn_mlp_res": hybrid,
        "num_experts_per_tok": top_k,
        "num_key_value_heads": kv_heads,
    }
    model = build(**changes).eval()
    model.save_pretrained(tmp_path)
    weights = {name: weight.double() for name, weight in load_file(tmp_path / "model.safetensors").items()}
    expected = equations(model.config, weights)(IDS).float()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS[None]).logits, model(IDS[None]).logits)
        for implementation in ("eager", "batched_mm", "grouped_mm", "arctic"):
            model.set_experts_implementation(implementation)
            assert torch.allclose(model(IDS[None]).logits[0], expected, atol=1e-5, rtol=1e-5), implementation
        steps = [loaded(IDS[None, :10], use_cache=True)]
        for at in range(10, 24):
            steps.append(loaded(IDS[None, at : at + 1], past_key_values=steps[-1].past_key_values, use_cache=True))
        assert torch.allclose(torch.cat([step.logits[0] for step in steps]), expected, atol=1e-5, rtol=1e-5), (
            "with a cache"
        )


def test_checkpoints_have_snowflakes_names(tmp_path):
    build(moe_layer_frequency=2).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    layer = "model.layers.1."
    expected = {f"{layer}{name}_layernorm.weight" for name in ("input", "post_attention", "residual")}
    expected |= {f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"} | {
        f"{layer}residual_mlp.w{i}.weight" for i in (1, 2, 3)
    }
    expected |= {f"{layer}block_sparse_moe.experts.{e}.w{i}.weight" for e in range(8) for i in (1, 2, 3)} | {
        f"{layer}block_sparse_moe.gate.weight"
    }
    assert {name for name in names if name.startswith(layer)} == expected
    assert "model.layers.0.block_sparse_moe.mlp.w1.weight" in names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_residual"] is config["parallel_attn_mlp_res"] is True
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "ArcticModel"


def test_a_config_as_snowflake_wrote_it(tmp_path):
    written = {
        **SIZES,
        "model_type": "arctic",
        "auto_map": {"AutoConfig": "configuration_arctic.ArcticConfig"},
        "quantization": None,
    }
    (tmp_path / "config.json").write_text(json.dumps({**written, "architectures": ["ArcticForCausalLM"]}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "ArcticConfig"
    assert config.use_residual is True
    assert config.rope_parameters["rope_theta"] == 1e4
    with pytest.raises(CheckpointError, match="parallel_attn_mlp_res is True and use_residual is False"):
        ArcticConfig(**SIZES, use_residual=False)
    with pytest.raises(CheckpointError, match="num_experts_per_tok is 2 and num_local_experts is 1"):
        ArcticConfig(**{**SIZES, "num_local_experts": 1})


def test_the_released_model_has_its_parameters():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ArcticConfig.released(), dtype=torch.bfloat16)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert round(total / 1e9, 1) == 478.6
    assert round((total - experts * 126 / 128) / 1e9, 1) == 17.3


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "arctic"])
def test_gradients_do_not_depend_on_who_computes_or_on_checkpointing(implementation):
    expected = build()
    expected.train()(IDS[None], labels=IDS[None]).loss.backward()
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = build().train()
        model.set_experts_implementation(implementation)
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
            model.enable_input_require_grads()
        model(IDS[None], labels=IDS[None], use_cache=False).loss.backward()
        for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.allclose(parameter.grad, other.grad, atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize(
    "plugins", [{}, {"fp8": {}, "lora": {"r": 4}}, {"fp8": {}, "lora": {"r": 4, "experts": True}}], ids=str
)
def test_compiled_layers_have_the_same_gradients(tmp_path, plugins):
    from arctic_plugins.testing import draw_adapter, tiny_model

    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layer_frequency": 1, "parallel_attn_mlp_res": True}
    checkpoint = tiny_model(tmp_path / "model", "arctic", **sizes)
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)  # adapters are drawn at random
        model, _ = load_model(checkpoint, Stack.from_dict(plugins))
        draw_adapter(model)
        called = torch.compile(model.train(), backend="aot_eager") if compiled else model.train()
        called(input_ids=IDS[None], labels=IDS[None], use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_rows_that_are_no_whole_sixteen_bytes_are_computed_one_expert_at_a_time():
    model = build(intermediate_size=45, hidden_size=72, num_attention_heads=4, num_key_value_heads=2).train()
    model.set_experts_implementation("eager")
    model(IDS[None], labels=IDS[None]).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_experts_implementation("arctic")
    model(IDS[None], labels=IDS[None]).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_the_auxiliary_loss_is_the_sum_over_layers():
    model = build(router_aux_loss_coef=0.5, router_z_loss_coef=0.25).eval()
    out = model(IDS[None], labels=IDS[None], output_router_logits=True)
    balance = z = 0.0
    for logits in out.router_logits:
        probabilities = logits.softmax(-1)
        chosen = torch.nn.functional.one_hot(probabilities.topk(2).indices, 8).sum(1).float()
        balance += 8 * (chosen.mean(0) * probabilities.mean(0)).sum()
        z += (logits.logsumexp(-1) ** 2).mean()
    assert len(out.router_logits) == 3
    assert torch.allclose(out.aux_loss, balance)
    without = model(IDS[None], labels=IDS[None], output_router_logits=False)
    assert without.aux_loss is None
    assert torch.allclose(out.loss, without.loss + 0.5 * balance + 0.25 * z)
    labels = len(IDS) - 1
    part = model(IDS[None], labels=IDS[None], output_router_logits=True, num_items_in_batch=4 * labels).loss
    assert torch.allclose(part, out.loss / 4), "of a step with four such batches"


def test_it_generates_with_left_padding():
    model = build(pad_token_id=0).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = model.generate(IDS[None, 12:], attention_mask=torch.ones(1, 12, dtype=torch.long), **options)
    padded = torch.stack([IDS, torch.cat([torch.zeros(12, dtype=torch.long), IDS[12:]])])
    mask = torch.ones_like(padded)
    mask[1, :12] = 0
    together = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(together[1, 24:], alone[0, 12:])


def test_the_tokenizer_speaks_chatml(tmp_path):
    import sentencepiece

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, minloglevel=2,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    build().config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "ArcticTokenizer",
                "legacy": False,
                "auto_map": {"AutoTokenizer": ["tokenization_arctic.ArcticTokenizer", None]},
            }
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__ == "ArcticTokenizer"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the fox"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer("the quick fox").input_ids, skip_special_tokens=True) == "the quick fox"


def test_encoded_and_back(tmp_path):
    from arctic_plugins_huggingface import save_checkpoint

    from arctic_plugins.testing import tiny_model

    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layer_frequency": 2, "parallel_attn_mlp_res": True}
    stack = Stack.from_dict({"fp8": {}})
    model, tokenizer = load_model(tiny_model(tmp_path / "plain", "arctic", **sizes), stack)
    save_checkpoint(model, tokenizer, tmp_path / "encoded", stack)
    again, _ = load_model(tmp_path / "encoded")
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS[None]).logits, model.eval()(IDS[None]).logits)
    owners = json.loads((tmp_path / "encoded" / "config.json").read_text())["quantization_config"]["modules"]
    assert any("experts" in pattern for pattern in owners)
    assert any("residual_mlp" in pattern for pattern in owners)


LOAD = """
import resource, sys, threading, time
import torch
from arctic_plugins_huggingface import load_model
def anonymous():
    return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("RssAnon"))
load_model(sys.argv[2])  # imports, and what they keep
before, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch); thread.start()
model, _ = load_model(sys.argv[1])
done.set(); thread.join()
print(peak[0] - before, anonymous() - before, sum(p.nbytes for p in model.parameters()) / 1e6)
"""


def test_many_experts_in_many_files_are_loaded_in_little_more_than_their_size(tmp_path):
    from arctic_plugins.testing import tiny_model

    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_experts_per_tok": 2,
        "parallel_attn_mlp_res": True,
    }
    small = tiny_model(
        tmp_path / "small", "arctic", **{**sizes, "hidden_size": 64, "num_hidden_layers": 1, "num_local_experts": 4}
    )
    large = tiny_model(tmp_path / "large", "arctic", **{**sizes, "moe_layer_frequency": 1, "num_local_experts": 64})
    weights = load_file(large / "model.safetensors")
    names = sorted(weights)
    parts = [names[at::20] for at in range(20)]  # scattered: no file has a whole layer
    index = {"metadata": {}, "weight_map": {}}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-00020.safetensors"
        save_file({name: weights[name] for name in part}, large / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    (large / "model.safetensors").unlink()
    (large / "model.safetensors.index.json").write_text(json.dumps(index))
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = run_python("-c", LOAD, large, small, environment=environment)
    peak, after, size = map(float, done.stdout.split()[-3:])
    layer = size / 6
    assert size > 290
    assert peak < size + 2 * layer, f"peak {peak} MB, {after} MB after, weights {size} MB"


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_the_heads_that_mixtral_has(tmp_path, task):
    auto_class = getattr(transformers, f"AutoModelFor{task}")
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layer_frequency": 1, "parallel_attn_mlp_res": True}
    checkpoint, stack = tiny_model(tmp_path / "causal", "arctic", **sizes), Stack.from_dict({"fp8": {}})
    causal = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = auto_class.from_pretrained(checkpoint)
    assert type(model).__name__ == f"ArcticFor{task}"
    mixtral = getattr(transformers, f"MixtralFor{task}")(MixtralConfig(hidden_size=64, num_hidden_layers=1))
    assert head_modules(model) == head_modules(mixtral)
    with torch.no_grad():
        expected = causal.model(IDS[None]).last_hidden_state
        assert torch.equal(model.base_model(IDS[None]).last_hidden_state, expected)
    labels = {
        "SequenceClassification": {"labels": torch.tensor([1])},
        "TokenClassification": {"labels": IDS[None] % 2},
        "QuestionAnswering": {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([2])},
    }
    model(IDS[None], **labels[task]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    encoded, tokenizer = load_model(checkpoint, stack, auto_class=auto_class)
    saved = save_checkpoint(encoded, tokenizer, tmp_path / "encoded", stack)
    again, _ = load_model(saved)
    with torch.no_grad():
        assert type(again) is type(model)
        assert torch.equal(again(IDS[None])[0], encoded(IDS[None])[0])
