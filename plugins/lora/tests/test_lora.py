"""LoRA over frozen weights: ordinary PEFT adapters, gradients that are right, merges that can be undone."""

import pytest
import torch
from arctic_plugins_huggingface import load_model, merge_adapter, save_checkpoint
from arctic_plugins_huggingface.adapters.layers import FrozenLoraLinear
from arctic_plugins_huggingface.adapters.lora import load_adapter
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from arctic_plugins import Stack
from arctic_plugins.adapter import read_adapter
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.frozen import FrozenLinear
from arctic_plugins.testing import tiny_llama, tiny_model

IDS = torch.arange(10, 42)[None]
FP8 = {"group_size": 32}


def randomize(model, seed=0):
    """Adapters start as zero; give them something to say, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture
def model(tiny_checkpoint):
    model, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": FP8, "lora": {"r": 4, "alpha": 8}}))
    return randomize(model)


def test_only_the_adapter_trains(model):
    assert isinstance(model, PeftModel)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    layers = [module for module in model.modules() if isinstance(module, FrozenLoraLinear)]
    assert len(layers) == 14
    assert not any("lm_head" in name for name in trainable)


def test_gradients_equal_those_over_the_decoded_weights(model, tiny_checkpoint):
    plain, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": FP8}))
    reference = randomize(
        get_peft_model(
            plain.dequantize(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    )
    losses = [built(IDS, labels=IDS).loss for built in (model, reference)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
def test_gradient_checkpointing_changes_nothing(tiny_checkpoint, use_dora, use_reentrant):
    """DoRA reads the decoded weights; with checkpointing, those of one layer at a time are kept for backward."""
    stack = Stack.from_dict({"fp8": FP8, "lora": {"r": 4, "use_dora": use_dora}})
    model = randomize(load_model(tiny_checkpoint, stack)[0])
    model.train()
    model(IDS, labels=IDS).loss.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_plain_peft_reads_the_adapter(model, tiny_checkpoint, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    base, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": FP8}))
    assert torch.equal(
        PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(IDS).logits, model.eval()(IDS).logits
    )
    over_plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), tmp_path / "adapter")
    assert over_plain(IDS).logits.isfinite().all()


def test_merge_is_decode_add_encode_and_can_be_undone(model):
    model.eval()
    before = model(IDS).logits
    name, layer = next((name, module) for name, module in model.named_modules() if isinstance(module, FrozenLoraLinear))
    frozen = layer.get_base_layer()
    bytes_before = {suffix: buffer.clone() for suffix, buffer in frozen.export().items()}
    expected = frozen.codec.encode(frozen.decode() + layer.get_delta_weight("default"))
    model.merge_adapter()
    assert all(torch.equal(buffer, frozen.export()[suffix]) for suffix, buffer in expected.items()), name
    merged = model(IDS).logits
    assert 0 < (merged - before).norm() / before.norm() < 0.5  # the rounding of 14 random layers to 8 bits
    model.unmerge_adapter()
    assert all(torch.equal(buffer, frozen.export()[suffix]) for suffix, buffer in bytes_before.items())
    assert torch.equal(model(IDS).logits, before)


def test_merge_and_unload_leaves_frozen_layers(model):
    merged = model.merge_and_unload()
    assert sum(isinstance(module, FrozenLinear) for module in merged.modules()) == 14
    assert not any("lora" in name for name, _ in merged.named_modules())


def test_a_merge_between_forward_and_backward_is_noticed(model):
    model.train()
    loss = model(IDS, labels=IDS).loss
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()


def test_a_merge_that_overflows_is_refused(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(float("inf"))
    with pytest.raises(Exception, match="NaN, Inf"):
        model.merge_adapter()


def test_dora_of_plain_peft_loads_over_encoded_weights(tiny_checkpoint, tmp_path):
    base, _ = load_model(tiny_checkpoint)
    get_peft_model(base, LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])).save_pretrained(tmp_path)
    frozen, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": FP8}))
    layer = next(module for module in load_adapter(frozen, tmp_path).modules() if isinstance(module, FrozenLoraLinear))
    assert layer.use_dora["default"]


def test_target_modules_that_match_nothing(tiny_checkpoint):
    with pytest.raises(ConfigError, match="target_modules .*'nothing'.* matches no module"):
        load_model(tiny_checkpoint, Stack.from_dict({"lora": {"target_modules": ["nothing"]}}))


def test_an_expression_of_the_recipe_is_saved_as_the_names_it_stands_for(tiny_checkpoint, tmp_path):
    """Nobody reads regular expressions out of a file, which may be a stranger's."""
    stack = Stack.from_dict({"fp8": FP8, "lora": {"target_modules": r".*\.0\..*\.(q|v)_proj", "r": 4}})
    model, tokenizer = load_model(tiny_checkpoint, stack)
    save_checkpoint(randomize(model), tokenizer, tmp_path / "adapter", stack)
    names = {f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qv"}
    assert set(read_adapter(tmp_path / "adapter").target_modules) == names
    assert load_checkpoint(tmp_path / "adapter")[0].targeted_module_names == model.targeted_module_names
    assert torch.equal(load_checkpoint(tmp_path / "adapter")[0](IDS).logits, model.eval()(IDS).logits)


def test_rslora_scales_by_the_root(tiny_checkpoint):
    model, _ = load_model(tiny_checkpoint, Stack.from_dict({"lora": {"r": 4, "alpha": 8, "use_rslora": True}}))
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    assert layer.scaling["default"] == 8 / 4**0.5


def test_engine_arguments_of_an_adapter(tmp_path):
    stack = Stack.from_dict({"lora": {"r": 4}})
    assert stack.vllm_engine_args(tmp_path) == {}
    for r, rank in ((4, 8), (12, 16), (512, 512)):
        (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "base", "r": {r}}}')
        arguments = stack.vllm_engine_args(tmp_path)
        assert (arguments["model"], arguments["max_lora_rank"]) == ("base", rank)
    for config, message in (
        ('{"base_model_name_or_path": "base", "r": 600}', "rank 600; expected at most 512"),
        ('{"r": 4}', "names no base"),
    ):
        (tmp_path / "adapter_config.json").write_text(config)
        with pytest.raises(CheckpointError, match=message):
            stack.vllm_engine_args(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "base", "peft_type": "OFT"}')
    with pytest.raises(
        CheckpointError, match="is OFT; expected LoRA or rsLoRA, which vLLM supports; merge the adapter"
    ):
        stack.vllm_engine_args(tmp_path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("rows", "targets"), [(300, ["q_proj"]), (270, ["q_proj"]), (300, ["q_proj", "embed_tokens"])])
def test_an_adapter_with_a_resized_embedding(tmp_path, rows, targets, tied):
    """PEFT saves the embedding and the head with it (``save_embedding_layers``), since the base model has others."""
    base, stack = tiny_llama(tmp_path / "base", tie_word_embeddings=tied), Stack.from_dict({"fp8": FP8})
    model, tokenizer = load_model(base, stack)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model = randomize(get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")))
    expected = model.eval()(IDS).logits
    save_checkpoint(model, tokenizer, tmp_path / "adapter", stack)
    if "embed_tokens" in targets and not tied:
        with pytest.raises(
            CheckpointError, match="300 tokens instead of 272, but no output head of that size; expected b"
        ):
            load_checkpoint(tmp_path / "adapter")
        return
    again, _ = load_checkpoint(tmp_path / "adapter")
    assert again.get_input_embeddings().weight.shape[0] == again.config.vocab_size == rows
    torch.testing.assert_close(again(IDS).logits, expected)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged")
    assert merged.config.tie_word_embeddings == (tied and "embed_tokens" not in targets)
    assert (merged(IDS).logits - expected).norm() / expected.norm() < 0.2
    if "embed_tokens" in targets:
        return
    with pytest.raises(CheckpointError, match="contains a new .*expected matrices of LoRA only, .*; merge the adapter"):
        Stack.from_dict({"lora": {}}).vllm_engine_args(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens of shape \(\d+, 64\); expected \(tokens, 32\)"):
        load_checkpoint(tmp_path / "adapter", base=tiny_llama(tmp_path / "narrow", hidden_size=32))


def test_a_model_that_peft_refuses_is_not_the_fault_of_the_plugin(tmp_path):
    """PEFT does not adapt the output projections of Mamba, whose kernels read their weights."""
    options = {"state_size": 16, "num_heads": 4, "expand": 2, "n_groups": 1, "head_dim": 32, "chunk_size": 8}
    base = tiny_model(tmp_path, "mamba2", **options)
    with pytest.raises(ConfigError, match=r"^PEFT refuses this adapter for this model: .*Mamba.*; change the options"):
        load_model(base, Stack.from_dict({"lora": {}}))
