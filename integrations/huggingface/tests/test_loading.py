"""Encode on load, save, reload, merge: the same bits every time, and an error rather than a wrong model."""

import json
import shutil

import pytest
import torch
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_huggingface import attach, freeze, load_model, merge_adapter, register, save_checkpoint
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_huggingface.loading.quantizer import ArcticQuantizer
from arctic_plugins_huggingface.loading.rope import positions
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from arctic_plugins import Stack, stack_from_checkpoint
from arctic_plugins.errors import CheckpointError, ClaimError, CodecError, ConfigError, PluginNotFoundError
from arctic_plugins.frozen import FrozenLinear
from arctic_plugins.provenance import FILE_NAME
from arctic_plugins.testing import MIXTURES, run_python, tiny_llama, tiny_model

IDS = torch.arange(10, 42)[None]
FP8 = Stack.from_dict({"fp8": {}})
GROUPED = Stack.from_dict({"fp8": {"group_size": 64}})  # 176 inputs: the last group is padded
MIXED = Stack.from_dict({"fp8": {"include": ["**.mlp.*"], "group_size": 32}})


@pytest.fixture(scope="module")
def encoded(tiny_checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("encoded") / "fp8"
    return save_checkpoint(*load_model(tiny_checkpoint, FP8), directory, FP8)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("stack", [FP8, GROUPED, MIXED], ids=["channel", "grouped", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_reload_is_bitwise(tiny_checkpoint, tmp_path, stack, dtype):
    model, tokenizer = load_model(tiny_checkpoint, stack, dtype=dtype)
    expected = logits(model)
    save_checkpoint(model, tokenizer, tmp_path / "out", stack)
    again, _ = load_model(tmp_path / "out", dtype=dtype)
    assert torch.equal(logits(again), expected)
    register()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(stock), expected)
    assert stack_from_checkpoint(tmp_path / "out").sha256() == stack.sha256()
    assert not [
        name
        for name, parameter in again.named_parameters()
        if isinstance(parameter, FrozenLinear) and parameter.requires_grad
    ]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_logits_are_those_of_the_decoded_weights(tiny_checkpoint):
    model, _ = load_model(tiny_checkpoint, GROUPED)
    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            weight = reference.get_submodule(name).weight.data
            decoded = module.codec.decode(module.codec.encode(weight), tuple(weight.shape), torch.float32)
            weight.copy_(decoded)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model.dequantize()), logits(reference), rtol=1e-5, atol=1e-5)


def test_freezing_a_loaded_model_gives_the_same_bits(tiny_checkpoint, encoded):
    model, _ = load_model(tiny_checkpoint)
    frozen = freeze(model, FP8)
    assert torch.equal(logits(frozen), logits(load_model(encoded)[0]))
    assert frozen.config.quantization_config.to_dict() == load_model(encoded)[0].config.quantization_config.to_dict()


def test_config_and_keys_on_disk(encoded):
    config = json.loads((encoded / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "arctic"
    assert config["format"] == 1
    assert config["codecs"] == {
        "fp8": {"type": "fp8", "bits": 8, "group_size": "channel", "scale": "max", "activations": "full"}
    }
    assert config["modules"]["model.layers.*.mlp.down_proj"] == "fp8"
    with safe_open(encoded / "model.safetensors", "pt") as file:
        weight, scale = (file.get_slice(f"model.layers.0.mlp.down_proj.weight{suffix}") for suffix in ("", "_scale"))
        assert (weight.get_dtype(), weight.get_shape()) == ("U8", [64, 1, 176])
        assert (scale.get_dtype(), scale.get_shape()) == ("F32", [64, 1])


def test_casting_leaves_the_encoded_bytes_alone(encoded):
    model, _ = load_model(encoded)
    layer = model.model.layers[0].mlp.up_proj
    before = {suffix: buffer.clone() for suffix, buffer in layer.export().items()}
    for change in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu"),
        lambda m: m.double(),
        lambda m: m.type(torch.float32),
    ):
        try:
            change(layer)
        except ValueError:
            continue
        assert all(
            torch.equal(buffer, layer.export()[suffix]) and buffer.dtype == layer.export()[suffix].dtype
            for suffix, buffer in before.items()
        )


def test_training_a_frozen_model_through_compile(encoded):
    model, _ = load_model(encoded)
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-4)


def test_biases_and_heads_of_their_own(tmp_path):
    checkpoint = tiny_llama(tmp_path / "biased", attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    model, tokenizer = load_model(checkpoint, Stack.from_dict({"fp8": {"exclude": []}}))
    assert isinstance(model.lm_head, FrozenLinear)
    assert model.model.layers[0].mlp.up_proj.bias is not None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    expected = logits(model)
    save_checkpoint(model, tokenizer, tmp_path / "out", FP8)
    assert torch.equal(logits(load_model(tmp_path / "out")[0]), expected)


def test_a_tied_head_cannot_be_encoded(tmp_path):
    checkpoint = tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    assert load_model(checkpoint, FP8)
    with pytest.raises(ClaimError, match="lm_head, whose weight is tied to the embedding"):
        load_model(checkpoint, Stack.from_dict({"fp8": {"exclude": []}}))


def test_weights_from_memory(tiny_checkpoint, tmp_path):
    without = shutil.copytree(tiny_checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(tiny_checkpoint / "model.safetensors")
    for stack in (Stack(), Stack.from_dict({"fp8": {}})):
        expected, _ = load_model(tiny_checkpoint, stack)
        model, _ = load_model(without, stack, state_dict=weights)
        assert torch.equal(logits(model), logits(expected))
        assert model.name_or_path == model.config.name_or_path == str(without)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of its model, for example model\.norm\.weight"):
        load_model(without, state_dict={name: value for name, value in weights.items() if name != "model.norm.weight"})


def test_running_out_of_memory_while_encoding_is_not_a_damaged_checkpoint(tiny_checkpoint, monkeypatch):
    def encode(self, weight):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FP8Codec, "encode", encode)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}}))


def test_no_memory_of_the_device_is_reserved_for_weights_that_are_placed(tiny_checkpoint, tmp_path, monkeypatch):
    reserved = {}
    prepare = ArcticQuantizer._process_model_before_weight_loading

    def prepare_and_ask(self, model, **kwargs):
        prepare(self, model, **kwargs)
        for name, value in model.named_parameters():
            reserved[name] = self.param_element_size(model, name, value) * value.numel()

    monkeypatch.setattr(ArcticQuantizer, "_process_model_before_weight_loading", prepare_and_ask)
    path = str(tmp_path / "files")
    plugins = {"fp8": {}, "offload": {"to": "disk", "path": path, "select": ["**.up_proj"]}}
    model, _ = load_model(tiny_checkpoint, Stack.from_dict(plugins))
    placed = {name for name, nbytes in reserved.items() if nbytes == 0}
    assert placed == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)}
    module = model.model.layers[0].mlp.gate_proj
    assert reserved["model.layers.0.mlp.gate_proj.weight"] == module.codec.nbytes(module.shape)


def test_nan_in_a_weight_names_the_tensor(tiny_checkpoint, tmp_path):
    model, tokenizer = load_model(tiny_checkpoint)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    save_checkpoint(model, tokenizer, tmp_path / "nan", Stack())
    with pytest.raises(CodecError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: the weight holds NaN"):
        load_model(tmp_path / "nan", FP8)


def damaged(source, directory, *, drop=(), change=None, config=None):
    """A copy of a checkpoint with tensors dropped or changed."""
    import shutil

    shutil.copytree(source, directory)
    (directory / "arctic_plugins.json").unlink()  # or it would say at once that the files are not those that were saved
    tensors = {key: value for key, value in load_file(source / "model.safetensors").items() if key not in drop}
    tensors.update({key: function(tensors[key]) for key, function in (change or {}).items()})
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    if config:
        content = json.loads((source / "config.json").read_text())
        content["quantization_config"].update(config)
        (directory / "config.json").write_text(json.dumps(content))
    return directory


KEY = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ({"drop": [f"{KEY}_scale"]}, CheckpointError, f"{KEY}_scale is missing"),
        ({"drop": [KEY]}, CheckpointError, f"{KEY} is missing"),
        ({"drop": [KEY, f"{KEY}_scale"]}, CheckpointError, f"{KEY} is missing"),
        (
            {"drop": ["model.norm.weight"]},
            CheckpointError,
            "lacks 1 weights of its model, for example model.norm.weight",
        ),
        (
            {"change": {KEY: lambda t: t[:-1].clone()}},
            CheckpointError,
            f"{KEY} is U8 \\(175, 1, 64\\); expected U8 \\(176, 1, 64\\)",
        ),
        ({"change": {f"{KEY}_scale": lambda t: t.repeat(1, 2)}}, CheckpointError, f"{KEY}_scale is F32 \\(176, 2\\)"),
        ({"config": {"format": 2}}, CheckpointError, "format 2; expected at most 1; upgrade arctic-plugins"),
        (
            {"config": {"codecs": {"fp8": {"type": "fp3"}}}},
            PluginNotFoundError,
            "no installed plugin provides the checkpoint's codec type 'fp3'",
        ),
        ({"config": {"codecs": {"fp8": {"type": "fp8", "bits": 5}}}}, CheckpointError, "is not valid"),
        ({"config": {"codecs": {}}}, CheckpointError, "names the codecs \\['fp8'\\]"),
        ({"config": {"modules": {"nothing": "fp8"}}}, CheckpointError, "matches no linear module"),
        ({"config": {"codecs": {"fp8": {"type": "fp8", "bits": 8, "group_size": 32}}}}, CheckpointError, "expected U8"),
    ],
    ids=lambda value: "" if not isinstance(value, dict) else next(iter(value)),
)
def test_a_damaged_checkpoint_is_an_error_and_never_a_wrong_model(encoded, tmp_path, damage, error, message):
    with pytest.raises(error, match=message) as raised:
        load_model(damaged(encoded, tmp_path / "damaged", **damage))
    assert "\n" not in str(raised.value)


def test_without_registration_transformers_refuses_the_checkpoint(encoded):
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(encoded)!r})"
    assert "MISMATCH" in run_python("-c", code, status=1).stderr


def test_what_is_known_to_fail_fails_before_weights_are_read(encoded, tiny_checkpoint, tmp_path):
    with pytest.raises(ClaimError, match="the checkpoint has FP8Codec.*but the stack requires FP8Codec"):
        load_model(encoded, GROUPED)
    with pytest.raises(CheckpointError, match="nowhere does not exist; expected a checkpoint directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        save_checkpoint(*load_model(tiny_checkpoint), encoded, FP8)
    with pytest.raises(ConfigError, match="'disk' while they are being encoded"):
        load_model(
            tiny_checkpoint,
            FP8,
            device_map={
                "model.embed_tokens": "cpu",
                "model.layers": "disk",
                "model.norm": "cpu",
                "model.rotary_emb": "cpu",
                "lm_head": "cpu",
            },
        )


def test_zero_stage_3_is_refused(tiny_checkpoint):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    kept = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # in force as long as it lives
    with pytest.raises(
        ConfigError, match="ZeRO stage 3, which splits weights while they are loaded; expected stage 1 or 2"
    ):
        load_model(tiny_checkpoint)
    del kept
    load_model(tiny_checkpoint)


def test_an_interrupted_save_leaves_nothing(tiny_checkpoint, tmp_path, monkeypatch):
    model, tokenizer = load_model(tiny_checkpoint)
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(model, tokenizer, tmp_path / "out", Stack())
    assert list(tmp_path.iterdir()) == []


LORA = {"fp8": {}, "lora": {"r": 4, "alpha": 8}}


@pytest.fixture
def adapter(tiny_checkpoint, tmp_path):
    stack = Stack.from_dict(LORA)
    model, tokenizer = load_model(tiny_checkpoint, stack)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return save_checkpoint(model, tokenizer, tmp_path / "adapter", stack), logits(model.eval())


def test_an_adapter_comes_back_on_its_encoded_base(adapter):
    directory, expected = adapter
    model, _ = load_checkpoint(directory)
    assert torch.equal(logits(model), expected)


def test_merging_adds_the_update_to_the_weights_before_encoding(adapter, tiny_checkpoint, tmp_path):
    directory, expected = adapter
    merged, _ = load_model(merge_adapter(directory, tmp_path / "merged"))
    assert sum(isinstance(module, FrozenLinear) for module in merged.modules()) == 14
    assert (logits(merged) - expected).norm() / expected.norm() < 0.5  # the rounding of 14 random layers to 8 bits
    update = next(
        module
        for name, module in load_checkpoint(directory)[0].named_modules()
        if name.endswith("layers.0.mlp.up_proj")
    ).get_delta_weight("default")
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).model.layers[0].mlp.up_proj.weight
    layer = merged.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, layer.codec.encode((plain + update).detach())[""])
    assert stack_from_checkpoint(tmp_path / "merged").to_dict().keys() == {"fp8"}


def test_merging_into_an_encoded_base(encoded, tmp_path):
    stack = Stack.from_dict(LORA)
    model, tokenizer = load_model(encoded, stack)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    expected = logits(model.eval())
    save_checkpoint(model, tokenizer, tmp_path / "adapter", stack)
    merged, _ = load_model(merge_adapter(tmp_path / "adapter", tmp_path / "merged"))
    assert (logits(merged) - expected).norm() / expected.norm() < 0.5


def test_merging_what_is_no_adapter(encoded, tmp_path):
    with pytest.raises(CheckpointError, match="adapter_config.json"):
        merge_adapter(encoded, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        merge_adapter(tmp_path / "nowhere", tmp_path / "merged")


def test_the_tokenizer_saved_with_an_adapter_stays_with_it(adapter, tmp_path):
    directory, _ = adapter
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    with pytest.raises(
        CheckpointError,
        match="chat_template.jinja has .* bytes.*if you made the change, delete the entry 'chat_template.jinja'",
    ):
        load_checkpoint(directory)
    record = json.loads((directory / "arctic_plugins.json").read_text())
    del record["files"]["chat_template.jinja"]
    (directory / "arctic_plugins.json").write_text(json.dumps(record))
    for _, tokenizer in (load_checkpoint(directory), load_model(merge_adapter(directory, tmp_path / "merged"))):
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_a_pickled_checkpoint_is_not_read(tiny_checkpoint, tmp_path):
    import shutil

    shutil.copytree(tiny_checkpoint, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(load_file(tiny_checkpoint / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError,
        match="has no model.safetensors; expected weights in safetensors; convert pytorch_model.bin; pickles are",
    ):
        load_model(tmp_path / "pickled")


def test_loading_reports_the_format_of_every_module(tiny_checkpoint, tmp_path, caplog):
    stack = Stack.from_dict(
        {"fp8": {"formats": {"**.mlp.*": {"bits": 6}, "**.self_attn.*": {"bits": 12, "group_size": 32}}}}
    )
    expected = {
        "lm_head: plain torch.float32",
        *(
            f"model.layers.*.mlp.{part}_proj: fp8 (bits 6, group_size 128, scale mse)"
            for part in ("gate", "up", "down")
        ),
        *(f"model.layers.*.self_attn.{part}_proj: fp8 (bits 12, group_size 32)" for part in "qkvo"),
    }
    with caplog.at_level("INFO", "arctic_plugins_huggingface"):
        model, tokenizer = load_model(tiny_checkpoint, stack)
    assert {record.getMessage() for record in caplog.records} == expected
    save_checkpoint(model, tokenizer, tmp_path / "mixed", stack)
    caplog.clear()
    with caplog.at_level("INFO", "arctic_plugins_huggingface"):
        again, _ = load_model(tmp_path / "mixed")
    assert {record.getMessage() for record in caplog.records} == expected
    x = torch.arange(8)[None]
    assert torch.equal(again(x).logits, model(x).logits)


def test_a_codec_that_takes_nothing_is_told(tiny_checkpoint, tmp_path):
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=261, n_positions=64)
    shutil.copytree(tiny_checkpoint, tmp_path / "gpt2")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    load_model(tmp_path / "gpt2")
    with pytest.raises(
        ClaimError,
        match=r"plugin 'fp8' claims nothing in this model, whose linear modules are lm_head; .*GPT-2's Conv1D",
    ):
        load_model(tmp_path / "gpt2", Stack.from_dict({"fp8": {}}))
    with pytest.raises(ClaimError, match="include 'lm_head' matches only modules that 'exclude' removes again"):
        load_model(tiny_checkpoint, Stack.from_dict({"fp8": {"include": ["**.mlp.*", "lm_head"]}}))


@pytest.mark.parametrize(
    ("model_type", "config", "expected"),
    [
        ("llama", {"max_position_embeddings": 512}, 512),
        (
            "llama",
            {
                "max_position_embeddings": 512,
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            },
            2048,
        ),
        (
            "llama",
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        ("gpt2", {"n_positions": 64}, 64),
        ("bloom", {}, None),
    ],
)
def test_how_many_tokens_a_model_takes(model_type, config, expected):
    assert positions(AutoConfig.for_model(model_type, **config)) == expected


ON_DISK = {
    "lm_head": "cpu",
    **dict.fromkeys((f"model.{part}" for part in ("embed_tokens", "layers.1", "norm", "rotary_emb")), "cpu"),
    "model.layers.0": "disk",
}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_device_map_leaves_encoded_weights_on_the_disk(tmp_path, name):
    """As it does with plain ones, for inference."""
    model_type, config = MIXTURES.get(name, (name, {}))
    plain = tiny_model(tmp_path / "plain", model_type, **config)
    model, tokenizer = load_model(plain, FP8)
    expected, encoded = logits(model), save_checkpoint(model, tokenizer, tmp_path / "encoded", FP8)
    options = {"device_map": ON_DISK, "offload_folder": str(tmp_path / "offload")}
    loaded, _ = load_model(encoded, **options)
    assert {parameter.device.type for parameter in loaded.model.layers[0].parameters()} == {"meta"}
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(encoded, **options)), expected)
    with pytest.raises(ConfigError, match="is offloaded by device_map; .*load it without device_map"):
        loaded.dequantize()
    with pytest.raises(ConfigError, match="where PEFT .* leaves new adapters without values; expected no adapter"):
        load_model(encoded, Stack.from_dict({"lora": {"r": 4}}), **options)
    trainer = Trainer(load_model(plain, **options)[0], TrainingArguments(str(tmp_path / "out"), report_to="none"))
    with pytest.raises(ConfigError, match="on 'disk', which accelerate supports for inference only; .*'offload'"):
        attach(trainer, FP8)
    with pytest.raises(ConfigError, match="while they are being encoded; save an encoded checkpoint"):
        load_model(plain, FP8, **options)
    placed = Stack.from_dict({"offload": {"to": "disk", "path": str(tmp_path / "placed")}})
    with pytest.raises(ConfigError, match="and a plugin decides where encoded weights go; expected one of the two"):
        load_model(encoded, placed, **options)


def test_an_offloaded_weight_is_checked(encoded, tmp_path):
    damaged = shutil.copytree(encoded, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name][:-1]}, damaged / "model.safetensors", {"format": "pt"})
    (damaged / FILE_NAME).unlink()
    register()
    with pytest.raises(CheckpointError, match=rf"{name} is torch.uint8 \(127, 1, 64\); expected"):
        AutoModelForCausalLM.from_pretrained(damaged, device_map=ON_DISK, offload_folder=str(tmp_path / "offload"))


def test_a_dequantized_model_has_one_dtype(encoded):
    for dtype in (None, torch.bfloat16):
        model = load_model(encoded, dtype=torch.float32)[0].dequantize(dtype=dtype)
        wanted = dtype or torch.float32
        assert {parameter.dtype for parameter in model.parameters()} == {wanted}
        assert model.config.dtype == wanted
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert logits(model).dtype == wanted


@pytest.mark.parametrize(
    "plugins", [{"fp8": {}}, {"fp8": {"bits": 6}}, {"fp8": {"bits": 12, "group_size": 64}}], ids=str
)
def test_parameters_are_counted_as_those_of_the_plain_model(tmp_path, plugins):
    plain = tiny_model(tmp_path / "plain", *MIXTURES["mixtral"][:1], **MIXTURES["mixtral"][1])
    expected, encoded = AutoModelForCausalLM.from_pretrained(plain), load_model(plain, Stack.from_dict(plugins))[0]
    for exclude in (False, True):
        assert encoded.num_parameters(exclude_embeddings=exclude) == expected.num_parameters(exclude_embeddings=exclude)
    placed = Stack.from_dict({**plugins, "offload": {"to": "disk", "path": str(tmp_path / "placed")}})
    assert load_model(plain, placed)[0].num_parameters() == expected.num_parameters()
    encoded.requires_grad_(False)
    assert encoded.num_parameters(only_trainable=True) == 0
