"""Tiles change nothing but memory."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from arctic_plugins_huggingface import ArcticTrainingArguments, attach, load_model, register
from arctic_plugins_longseq.hf import offload_activations
from arctic_plugins_longseq.loss import tiled_cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from arctic_plugins import Stack
from arctic_plugins.errors import ConfigError, ResolveError
from arctic_plugins.testing import LLAMA_LIKE, draw_adapter, tiny_llama, tiny_model

VOCABULARY, LENGTH = 272, 40
ARCTIC = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layer_frequency": 1, "parallel_attn_mlp_res": True}
MODELS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("llama", {}),
    "arctic": ("arctic", {**ARCTIC, "output_router_logits": True}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    register()
    directory = tmp_path_factory.mktemp("models")
    return {name: tiny_model(directory / name, model_type, **config) for name, (model_type, config) in MODELS.items()}


def batch(rows=2):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (rows, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, :9], labels[0, 20:23] = -100, -100
    mask = torch.ones_like(ids)
    ids[-1, 30:], labels[-1, 30:], mask[-1, 30:] = 0, -100, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def loaded(checkpoint, plugins):
    torch.manual_seed(0)
    model, _ = load_model(checkpoint, Stack.from_dict(plugins))
    draw_adapter(model)
    return model.train()


def gradients(model, **more):
    outputs = model(**batch(), use_cache=False, **more)
    outputs.loss.backward()
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


ADAPTERS = {
    "lora": {"lora": {"r": 4}},
    "fp8 head": {"fp8": {"include": ["**.mlp.*", "lm_head"], "exclude": []}, "lora": {"r": 4}},
    "adapted head": {"lora": {"r": 4, "target_modules": ["q_proj", "lm_head"]}},
    "adapted fp8 head": {
        "fp8": {"include": ["lm_head"], "exclude": []},
        "lora": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    },
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_head_and_tiled_mlps(checkpoints, name, checkpointing, dtype):
    tiles = {"longseq": {"loss_tile": 16, "tiled_mlp": True, "mlp_tile": 13}}
    results = []
    for plugins in (ADAPTERS[name], {**ADAPTERS[name], **tiles}):
        model = loaded(checkpoints["untied"], plugins)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            results.append(gradients(model))
    (expected, wanted), (found, got) = results
    if dtype == torch.float32:
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        same(got, wanted)
    else:
        torch.testing.assert_close(found.loss, expected.loss, rtol=5e-3, atol=0)
        for key, gradient in wanted.items():
            assert (got[key] - gradient).norm() < 0.05 * gradient.norm() + 1e-6, key


class Largest(TorchDispatchMode):
    """Of all results of operators: the most rows with a vocabulary's columns."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return result


def test_logits_of_all_tokens_never_exist(checkpoints):
    seen = {}
    for plugins in ({}, {"longseq": {"loss_tile": 7}}):
        model = loaded(checkpoints["untied"], {"lora": {"r": 2}, **plugins})
        with Largest() as mode:
            gradients(model)
        seen[bool(plugins)] = mode.rows
    assert seen[False] >= 2 * LENGTH
    assert seen[True] <= 64, "of tokens; a head's own weight has as many rows as the hidden size"
    assert model.config.hidden_size == 64


def test_a_copied_model_computes_with_its_own_weights(checkpoints):
    model = loaded(checkpoints["untied"], {"longseq": {"tiled_mlp": True, "recompute": 0.5}})
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    plain = loaded(checkpoints["untied"], {})
    plain.load_state_dict(other.state_dict())
    (expected, reference), (outputs, found) = gradients(plain), gradients(other)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-6, atol=0)
    same(found, reference)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_computed_of_tokens_that_do_not_count():
    seen = []

    def head(x):
        seen.append(len(x))
        return x

    labels = torch.full((10,), -100)
    assert tiled_cross_entropy(torch.randn(10, 6), labels, head, [], 4) == 0
    labels[[2, 3, 7, 8, 9]] = 1
    tiled_cross_entropy(torch.randn(10, 6, requires_grad=True), labels, head, [], 4).backward()
    assert seen == [4, 1]


def run(checkpoint, output, plugins, **options):
    rows = [{key: value[0] for key, value in batch(1).items()} for _ in range(16)]
    for at, row in enumerate(rows):
        row["labels"] = row["labels"].masked_fill(torch.arange(LENGTH) < 10 + at, -100)
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
    }
    defaults |= {"use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2, "disable_tqdm": True}
    args = ArcticTrainingArguments(output_dir=str(output), plugins=plugins, **{**defaults, **options})
    stack = Stack.from_dict(args.plugins)
    trainer = attach(
        Trainer(model=loaded(checkpoint, plugins), args=args, train_dataset=rows, eval_dataset=rows[:4]), stack
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.evaluate()["eval_loss"]


def test_a_run_of_the_trainer_with_accumulated_batches(checkpoints, tmp_path):
    plugins = {"fp8": {}, "lora": {"r": 4}}
    expected, evaluated = run(checkpoints["untied"], tmp_path, plugins)
    found, again = run(checkpoints["untied"], tmp_path, {**plugins, "longseq": {"tiled_mlp": True}})
    assert found == pytest.approx(expected, rel=1e-5)
    assert again == pytest.approx(evaluated, rel=1e-5)
    assert expected[0] != expected[-1]


def test_what_tiles_would_leave_out_is_refused(tmp_path):
    register()
    checkpoint = tiny_model(tmp_path / "gemma2", *LLAMA_LIKE["gemma2"][:1], **LLAMA_LIKE["gemma2"][1])
    with pytest.raises(
        ConfigError,
        match=r"Gemma2ForCausalLM changes logits after its head "
        r"\(logits = logits / self.config.final_logit_softcapping",
    ):
        load_model(checkpoint, Stack.from_dict({"longseq": {}}))
    load_model(checkpoint, Stack.from_dict({"longseq": {"tiled_loss": False, "tiled_mlp": True}}))
    gpt2 = tiny_model(tmp_path / "gpt2", "gpt2", n_layer=1, n_head=2, n_embd=32)
    load_model(gpt2, Stack.from_dict({"longseq": {"tiled_mlp": True}}))
    model, _ = load_model(tiny_llama(tmp_path / "llama"))
    model.loss_function = lambda *args, **kwargs: None
    with pytest.raises(ConfigError, match="has its own loss function"):
        Stack.from_dict({"longseq": {}}).hf_transform_model(model)


def test_a_tile_that_nothing_uses_is_said(checkpoints, caplog):
    load_model(checkpoints["untied"], Stack.from_dict({"longseq": {"mlp_tile": 4}}))
    assert "mlp_tile is set, but mlp is not tiled" in caplog.text


@pytest.mark.parametrize("name", ["tied", "arctic"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_recomputed_layers_give_the_same_and_keep_less(checkpoints, name, share):
    adapters, results = {"fp8": {}, "lora": {"r": 4}}, {}
    for recompute in (0, share):
        model, kept = (
            loaded(checkpoints[name], {**adapters, "longseq": {"tiled_loss": False, "recompute": recompute}}),
            {},
        )

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results[recompute] = (*gradients(model), sum(kept.values()))
    torch.testing.assert_close(results[share][0].loss, results[0][0].loss, rtol=1e-6, atol=0)
    same(results[share][1], results[0][1])
    assert results[share][2] < (1 - 0.4 * share) * results[0][2]


def test_a_share_of_layers_beside_the_hosts_own_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"recompute is 0.5 and training.gradient_checkpointing is on"):
        ArcticTrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            plugins={"longseq": {"recompute": 0.5}},
            gradient_checkpointing=True,
        )


def test_layers_that_cannot_be_recomputed_are_said(checkpoints):
    with pytest.raises(ConfigError, match="layers cannot be recomputed"):
        Stack.from_dict({"longseq": {"recompute": 1, "tiled_loss": False}}).hf_transform_model(torch.nn.Linear(2, 2))


def test_without_a_gpu_activations_stay_where_they_are(checkpoints, tmp_path, caplog):
    plugins = {"lora": {"r": 4}, "longseq": {"recompute": 1}}
    expected = run(checkpoints["untied"], tmp_path, plugins)
    assert (
        run(checkpoints["untied"], tmp_path, {**plugins, "longseq": {"recompute": 1, "offload_activations": True}})
        == expected
    )
    assert "offload_activations has no effect without a GPU" in caplog.text


def test_offloaded_activations_need_no_wait_for_the_device(checkpoints, monkeypatch):
    """TRL's context with the CPU in place of a GPU: its streams have no synchronize()."""
    cpu, empty_like, moved = torch.device("cpu"), torch.empty_like, []

    def unpinned(*args, pin_memory=False, **kwargs):
        if pin_memory:
            moved.append(args[0].nbytes)
        return empty_like(*args, **kwargs)

    monkeypatch.setattr(torch, "empty_like", unpinned)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    results = []
    for offloaded in (False, True):
        model = loaded(checkpoints["untied"], {"fp8": {}, "lora": {"r": 4}, "longseq": {"recompute": 1}})
        with monkeypatch.context() as accelerator:
            accelerator.setattr(torch.accelerator, "current_accelerator", lambda: cpu)
            context = offload_activations(model) if offloaded else nullcontext()
        for _ in range(2):
            model.zero_grad()
            with context:
                results.append(gradients(model))
    for outputs, found in results:
        assert torch.equal(outputs.loss, results[0][0].loss)
        assert all(torch.equal(found[name], gradient) for name, gradient in results[0][1].items())
    layers = model.config.num_hidden_layers
    assert len(moved) == 2 * (layers + 1), "the input of every layer and of the last norm, and nothing of the loss"
    assert not hasattr(torch.cpu.current_stream(), "synchronize"), "or else this test cannot fail"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_with_activations_in_host_memory_waits_for_nothing(checkpoints):
    """Nor with weights there. The tiled loss is left out: it waits once, to find the tokens that count."""
    pytest.importorskip("trl")
    plugins = {"fp8": {}, "lora": {"r": 4}, "offload": {}, "longseq": {"recompute": 1, "tiled_loss": False}}
    model = loaded(checkpoints["untied"], plugins).cuda()
    context, inputs = offload_activations(model), {key: value.cuda() for key, value in batch().items()}
    # With a mask of two dimensions, transformers looks for padding, and waits for that.
    inputs["attention_mask"] = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool, device="cuda").tril()
    for step in range(10):
        torch.cuda.set_sync_debug_mode("error" if step > 7 else "default")
        try:
            with context:
                model(**inputs, use_cache=False).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_activations_in_host_memory_change_nothing(checkpoints, tmp_path):
    pytest.importorskip("trl")
    plugins = {"lora": {"r": 4}, "longseq": {"recompute": 1}}
    expected = run(checkpoints["untied"], tmp_path, plugins, use_cpu=False)
    found = run(
        checkpoints["untied"],
        tmp_path,
        {**plugins, "longseq": {"recompute": 1, "offload_activations": True}},
        use_cpu=False,
    )
    assert found[0] == pytest.approx(expected[0], rel=1e-6)


def test_another_loss_beside_it_is_an_error(install_plugin):
    install_plugin(
        "other",
        "from arctic_plugins import Plugin\nclass plugin(Plugin):\n    name = 'other'\n    slots = frozenset({'loss'})",
    )
    with pytest.raises(ResolveError, match=r"(?s)longseq.*other|other.*longseq"):
        Stack.from_dict({"longseq": {}, "other": {}})


def test_a_recipe(checkpoints, tmp_path):
    from arctic_plugins_huggingface.training.recipe import Recipe
    from arctic_plugins_huggingface.training.run import train

    (tmp_path / "data.jsonl").write_text(
        "\n".join(json.dumps({"instruction": f"Say {n}.", "output": str(n)}) for n in range(16))
    )
    losses = {}
    for plugins in ({}, {"longseq": {"tiled_mlp": True}}):
        training = {
            "output_dir": str(tmp_path / f"out{len(plugins)}"),
            "max_steps": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
        }
        recipe = {
            "model": str(checkpoints["untied"]),
            "plugins": {"lora": {"r": 4}, **plugins},
            "data": {"path": "data.jsonl", "max_length": 64},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "training": {**training, "bf16": False}}))
        losses[len(plugins)] = [
            entry["loss"] for entry in train(Recipe.from_file(tmp_path / "recipe.yaml")).history if "loss" in entry
        ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
