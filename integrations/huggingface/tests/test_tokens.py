"""New tokens, and chat templates for models without one: from the recipe to the answer."""

import json
import shutil

import pytest
import torch
from arctic_plugins_huggingface import load_model, merge_adapter, plan_model
from arctic_plugins_huggingface.adapters import new_token_rows
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_huggingface.generate import answer
from arctic_plugins_huggingface.training.dry_run import make_plan
from arctic_plugins_huggingface.training.preparation import prepare
from arctic_plugins_huggingface.training.recipe import Recipe
from arctic_plugins_huggingface.training.run import train
from arctic_plugins_huggingface.training.templates import known_templates, read_template, set_template
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, TrainerCallback

from arctic_plugins import Stack
from arctic_plugins.errors import CheckpointError, ConfigError, DataError
from arctic_plugins.testing import tiny_model

PLUGINS = {"fp8": {}, "lora": {"r": 4}}
NEW = ("<new1>", "<new2>")
RECORDS = [{"instruction": f"Say {number}.", "output": "<new1><new2>"} for number in range(8)]


def recipe(directory, checkpoint, plugins=PLUGINS, records=RECORDS, data=None, **training):
    (directory / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    content = {
        "model": str(checkpoint),
        "plugins": plugins,
        "data": {"path": "data.jsonl", "max_length": 256, "new_tokens": NEW, **(data or {})},
        "training": {
            "output_dir": str(directory / "out"),
            "max_steps": 12,
            "save_steps": 6,
            "logging_steps": 1,
            "learning_rate": 3e-2,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "bf16": False,
            "seed": 0,
            **training,
        },
    }
    (directory / "recipe.yaml").write_text(json.dumps(content))
    return Recipe.from_file(directory / "recipe.yaml")


def losses(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


def said(model, tokenizer):
    return next(iter(answer(model, tokenizer, ["Say 3."], max_new_tokens=4)))


class Stopped(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == 6


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def run(request, tmp_path_factory):
    """A run with two tokens that the tokenizer lacks; the model has a spare row for one of them."""
    directory = tmp_path_factory.mktemp("tokens")
    tied = {"tie_word_embeddings": request.param}
    checkpoint = tiny_model(directory / "model", "llama", vocab_size=262, **tied)
    made = recipe(directory, checkpoint)
    return made, train(made), request.param


def test_rows_of_new_tokens_are_learnt_saved_and_merged(run, tmp_path):
    _, result, tied = run
    assert result.tokenizer.convert_tokens_to_ids(list(NEW)) == [261, 262]
    assert losses(result)[-1] < losses(result)[0] / 2
    saved = load_file(result.directory / "adapter_model.safetensors")
    rows = {name: tensor.shape for name, tensor in saved.items() if "lora" not in name}
    assert {*rows.values()} == {(2, 64)}, "no whole embedding is saved"
    assert len(rows) == (1 if tied else 2)
    assert said(result.model, result.tokenizer).startswith("<new1><new2>")
    model, tokenizer = load_checkpoint(result.directory)
    ids = torch.tensor([[5, 261, 262, 9]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, result.model.eval()(ids).logits)
    merged, tokenizer = load_model(merge_adapter(result.directory, tmp_path / "merged"))
    assert merged.get_input_embeddings().num_embeddings == merged.config.vocab_size == len(tokenizer) == 263
    assert merged.config.tie_word_embeddings == tied
    assert said(merged, tokenizer).startswith("<new1><new2>")


def test_a_dry_run_counts_their_rows(run):
    made, result, _ = run
    assert make_plan(prepare(made)).trainable_parameters == result.trainable_parameters


def test_a_resumed_run_is_the_run_that_it_continues(run, tmp_path):
    made, whole, _ = run
    shutil.copy(made.data.path, tmp_path / "data.jsonl")
    again = made.model_copy(update={"training": {**made.training, "output_dir": str(tmp_path / "out")}})
    train(again, callbacks=[Stopped()])
    shutil.rmtree(tmp_path / "out" / "final")
    checkpoint = load_file(tmp_path / "out" / "checkpoint-6" / "adapter_model.safetensors")
    assert max(tensor.shape[0] for name, tensor in checkpoint.items() if "lora" not in name) == 2
    assert losses(train(again, resume=True)) == losses(whole)


@pytest.mark.parametrize("tied", [False, True])
def test_preferences_train_the_rows_too(tmp_path, tied):
    """TRL reads the head's weight without calling it."""
    checkpoint = tiny_model(tmp_path / "model", "llama", vocab_size=262, tie_word_embeddings=tied)
    records = [{"prompt": f"Say {n}.", "chosen": "<new1>", "rejected": "<new2>"} for n in range(8)]
    made = recipe(tmp_path, checkpoint, records=records, data={"format": "preference"}, trainer="dpo", max_steps=4)
    result = train(made)
    assert losses(result)[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses(result)[-1] < 0.5
    rows = [module for module in result.model.modules() if hasattr(module, "trainable_tokens_delta")]
    assert len(rows) == 2
    for module in rows:
        changed = module.trainable_tokens_delta["default"] != module.trainable_tokens_original["default"]
        assert changed.any(dim=1).all()


def test_vllm_gets_it_merged(run):
    _, result, _ = run
    with pytest.raises(CheckpointError, match=r"has trainable_token_indices .*merge the adapter with 'arctic merge'"):
        Stack.from_dict({"lora": {}}).vllm_engine_args(result.directory)


def test_an_adapter_cannot_make_an_embedding_of_any_size(run, tmp_path):
    _, result, _ = run
    adapter = tmp_path / "adapter"
    shutil.copytree(result.directory, adapter)
    (adapter / "arctic_plugins.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["trainable_token_indices"] = {name: [5, 10**9] for name in config["trainable_token_indices"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    from arctic_plugins_huggingface.adapters import load_adapter

    model, _ = load_model(config["base_model_name_or_path"])
    with pytest.raises(CheckpointError, match="trains the token 1000000000, but its base model has 262 embeddings"):
        load_adapter(model, adapter)


def test_every_row_is_trained_without_an_adapter(tmp_path):
    checkpoint = tiny_model(tmp_path / "model", "llama", vocab_size=262)
    result = train(recipe(tmp_path, checkpoint, plugins={}, learning_rate=1e-3, max_steps=2))
    model, tokenizer = load_model(result.directory)
    assert (model.config.vocab_size, tokenizer.convert_tokens_to_ids("<new2>")) == (263, 262)
    assert new_token_rows(model) == {}


def test_an_encoded_base_grows_likewise(tmp_path):
    from arctic_plugins_huggingface import save_checkpoint

    stack = Stack.from_dict({"fp8": {}})
    plain = tiny_model(tmp_path / "model", "llama", vocab_size=262)
    encoded = save_checkpoint(*load_model(plain, stack), tmp_path / "encoded", stack)
    result = train(recipe(tmp_path, encoded, plugins={"lora": {"r": 4}}, max_steps=2))
    model, tokenizer = load_model(merge_adapter(result.directory, tmp_path / "merged"))
    assert model.config.vocab_size == len(tokenizer) == 263


@pytest.fixture
def extended(tmp_path):
    """A checkpoint whose tokenizer has 40 tokens more than the model has embeddings."""
    checkpoint = tiny_model(tmp_path / "model", "llama", vocab_size=261)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens([f"<new{number}>" for number in range(40)])
    tokenizer.save_pretrained(checkpoint)
    return checkpoint


def test_tokens_without_embeddings_are_told_before_weights_are_read(extended, tmp_path, monkeypatch):
    monkeypatch.setattr("arctic_plugins_huggingface.training.run.load_model", None)
    with pytest.raises(
        DataError,
        match=r"no embedding for 2 of the tokens in the data: '<new1>' \(262\), '<new2>' \(263\), first at "
        r".*data\.jsonl:1; expected tokens below 261; list them under data\.new_tokens",
    ):
        train(recipe(tmp_path, extended, data={"new_tokens": []}))


def test_they_are_trained_if_the_recipe_says_so(extended, tmp_path):
    result = train(recipe(tmp_path, extended, max_steps=1))
    assert result.model.get_base_model().config.vocab_size == 301


def test_tokens_that_the_data_do_not_have_do_not_matter(extended, tmp_path):
    records = [{"instruction": "a", "output": "b"}]
    result = train(recipe(tmp_path, extended, records=records, data={"new_tokens": []}, max_steps=1))
    assert result.model.get_base_model().config.vocab_size == 261


def test_padding_without_an_embedding_becomes_the_end_of_text(extended, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(extended)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(extended)
    records = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "longer"}]
    made = recipe(tmp_path, extended, records=records, data={"new_tokens": []}, max_steps=1)
    assert train(made).tokenizer.pad_token == "<|end|>"
    assert "261 embeddings and none for the padding token '[PAD]' (301): padding with '<|end|>'" in caplog.text


def test_a_head_that_rows_cannot_replace_is_told(tmp_path):
    checkpoint = tiny_model(tmp_path / "model", "phi", vocab_size=261, hidden_size=128, partial_rotary_factor=0.5)
    with pytest.raises(ConfigError, match=r"the output head of this model \(phi\) has biases"):
        load_model(checkpoint, Stack.from_dict({"lora": {"r": 2}}), new_tokens=["<new>"])
    with pytest.raises(ConfigError, match="the output head, which grows with the embedding, is encoded"):
        load_model(checkpoint, Stack.from_dict({"fp8": {"exclude": []}}), new_tokens=["<new>"])


def test_a_script_names_new_tokens_too(tiny_checkpoint):
    model, tokenizer = load_model(tiny_checkpoint, Stack.from_dict({"lora": {"r": 2}}), new_tokens=["<new>"])
    token = tokenizer.convert_tokens_to_ids("<new>")
    assert token < 272, "an id for which the model has a spare row"
    assert model.get_base_model().config.vocab_size == 272
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name]
    assert len(trained) == 2
    with pytest.raises(TypeError, match="pass stack, dtype and further arguments to plan_model"):
        load_model(plan_model(tiny_checkpoint), new_tokens=["<new>"])


@pytest.fixture
def base(tmp_path):
    """A base model: without a chat template, with another end than a chat's."""
    checkpoint = tiny_model(tmp_path / "model", "llama")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token = None, "<s>", "<s>"
    tokenizer.save_pretrained(checkpoint)
    (checkpoint / "chat_template.jinja").unlink()
    GenerationConfig(eos_token_id=0, bos_token_id=0, pad_token_id=0).save_pretrained(checkpoint)
    return checkpoint


def test_a_base_model_without_a_template_is_told_of_the_option(base, tmp_path):
    with pytest.raises(DataError, match=r"has no chat template; expected .*; set data\.chat_template \(chatml, alpaca"):
        prepare(recipe(tmp_path, base, data={"new_tokens": []}))


FILE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("own", [False, True], ids=["alpaca", "a file"])
def test_a_template_goes_with_the_adapter_wherever_it_answers(base, tmp_path, own):
    (tmp_path / "own.jinja").write_text(FILE)
    records = [{"instruction": f"Say {number}.", "output": "ok"} for number in range(8)]
    data = {"new_tokens": [], "chat_template": "own.jinja" if own else "alpaca"}
    result = train(recipe(tmp_path, base, records=records, data=data, max_steps=20))
    model, tokenizer = load_checkpoint(result.directory)
    assert tokenizer.eos_token == ("<|end|>" if own else "<s>")
    assert tokenizer.chat_template == result.tokenizer.chat_template is not None
    assert said(model, tokenizer) == "ok", "and stops there"
    merged, tokenizer = load_model(merge_adapter(result.directory, tmp_path / "merged"))
    assert said(merged, tokenizer) == "ok"
    ends = GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    assert ends == ([0, 1] if own else 0)
    arguments = Stack.from_dict({"lora": {}}).vllm_engine_args(result.directory)
    assert arguments["tokenizer"] == str(result.directory)


def rendered(tokenizer, system=False):
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "R"}]
    chat = [{"role": "system", "content": "S"}, *chat] if system else chat
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_known_templates(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_template(tokenizer, "chatml")
    assert rendered(tokenizer, system=True) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|><s>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    set_template(tokenizer, "chatml")
    assert tokenizer.eos_token == "<|im_end|>"
    assert "A<|im_end|>\n<|im_start|>user" in rendered(tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_template(tokenizer, "alpaca")
    instruction = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    exchange = "\n\n### Instruction:\nQ\n\n### Response:\nA<s>\n\n### Instruction:\nR\n\n### Response:\n"
    assert rendered(tokenizer) == instruction + exchange
    assert rendered(tokenizer, system=True) == "S" + exchange
    assert {"chatml", "alpaca", "llama3", "qwen3"} <= {*known_templates()}
    assert all(read_template(name) for name in known_templates())


def test_a_tokenizer_that_begins_texts_with_a_token_begins_chats_with_it(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    set_template(tokenizer, "chatml")
    assert rendered(tokenizer).startswith("<s><|im_start|>user")


def test_an_end_that_is_no_token_is_told(base, caplog):
    set_template(AutoTokenizer.from_pretrained(base), "llama3")
    assert "an answer ends with '<|eot_id|>', which is not a token of this tokenizer" in caplog.text
    assert "data.new_tokens" in caplog.text


def test_templates_that_do_not_exist_are_told(base, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.chat_template 'chatlm' is neither .*did you mean 'chatml'"):
        prepare(recipe(tmp_path, base, data={"chat_template": "chatlm"}))
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        prepare(recipe(tmp_path, base, data={"chat_template": "bad.jinja"}))
