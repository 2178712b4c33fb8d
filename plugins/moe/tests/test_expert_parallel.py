"""Experts in several real processes (gloo): the losses, norms and weights of one process, whatever the model, and from
a checkpoint on.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from arctic_plugins_huggingface import load_model, merge_adapter, register
from arctic_plugins_huggingface.adapters.lora import load_adapter
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from safetensors.torch import load_file

from arctic_plugins import Stack
from arctic_plugins.errors import ClaimError, ConfigError
from arctic_plugins.testing import MIXTURES, run_processes, said, tiny_model

SCRIPT = Path(__file__).with_name("processes.py")
MODELS = {
    **MIXTURES,
    "arctic": (
        "arctic",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layer_frequency": 1, "parallel_attn_mlp_res": True},
    ),
}
PLUGINS = {"moe": {"expert_parallel": 2}}


def zero(stage):
    """Options of a run with DeepSpeed."""
    auto = ("gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    return {"deepspeed": {"zero_optimization": {"stage": stage}, **dict.fromkeys(auto, "auto")}}


def run(processes, task, *arguments, fails=False):
    """``task`` of ``processes.py``: what each process said, or with ``fails`` the standard error."""
    done = run_processes(SCRIPT, processes, task, *arguments, timeout=600, status=None if fails else 0)
    if fails:
        assert done.returncode != 0
        return done.stderr
    return said(done)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    register()
    directory = tmp_path_factory.mktemp("models")
    return {name: tiny_model(directory / name, model_type, **config) for name, (model_type, config) in MODELS.items()}


@pytest.fixture(scope="module")
def alone(checkpoints, tmp_path_factory):
    """One process, 20 steps of Arctic with all gradients clipped, by options of the plugin: figures and weights."""

    @functools.cache
    def train(options):
        output = tmp_path_factory.mktemp("alone")
        (found,) = run(1, "train", checkpoints["arctic"], output, {"moe": json.loads(options)})
        assert all(norm > 0.5 for norm in found["grad_norm"]), "clipping is active in every step"
        return found, load_file(output / "final" / "model.safetensors")

    return lambda **options: train(json.dumps(options))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("mixtral", "arctic") else pytest.mark.slow) for name in MODELS]
)
def test_logits_and_gradients_are_those_of_one_process(checkpoints, name):
    for plugins in ({}, {"fp8": {}}):
        for found in run(2, "compare", checkpoints[name], plugins):
            assert found["logits"] < 1e-4, found
            assert found["gradients"] < 1e-5, found
            assert found["elements"] < 0.9 * found["whole"], "each process holds its own experts only"


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (1, {"overlap_degree": 4}),
        (2, {"expert_parallel": 2}),
        (2, {"expert_parallel": 2, "overlap_degree": 3}),
        (4, {"expert_parallel": 2, "overlap_degree": 2, "capacity_factor": 1.0}),
        (4, {"expert_parallel": 4}),
    ],
    ids=str,
)
def test_the_dispatch_keeps_the_contract(processes, options):
    assert len(run(processes, "check", options)) == processes


BALANCE = {"router_aux_loss_coef": 0.5}


@pytest.mark.parametrize(
    ("processes", "parallel", "losses", "options"),
    [
        (2, 2, {}, {"gradient_accumulation_steps": 2}),
        (4, 2, BALANCE, {}),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 2, BALANCE, {}), (4, 4, {}, {}))),
    ],
    ids=str,
)
def test_training_equals_one_process(checkpoints, alone, tmp_path, processes, parallel, losses, options):
    """Also with the load balancing loss, which is that of the tokens of all processes."""
    (found,) = run(
        processes, "train", checkpoints["arctic"], tmp_path, {"moe": {"expert_parallel": parallel, **losses}}, options
    )
    expected, weights = alone(**losses)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    saved = load_file(tmp_path / "final" / "model.safetensors")
    assert saved.keys() == weights.keys(), "a checkpoint like any other"
    for name, weight in weights.items():
        assert (saved[name] - weight).norm() < 1e-3 * weight.norm(), name
    assert len(found["figures"]) == 2 * 4, "load, entropy and auxiliary loss of both layers are logged"
    load_model(tmp_path / "final")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "stage", "options"), [(4, 1, {}), (2, 2, {"gradient_accumulation_steps": 2})], ids=str
)
def test_training_under_deepspeed_equals_one_process(checkpoints, alone, tmp_path, processes, stage, options):
    (found,) = run(processes, "train", checkpoints["arctic"], tmp_path, PLUGINS, {**zero(stage), **options})
    expected, weights = alone()
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    for name, saved in load_file(tmp_path / "final" / "model.safetensors").items():
        assert (saved - weights[name]).norm() < 1e-3 * weights[name].norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapters", [{}, {"fp8": {}, "lora": {"r": 4}}, {"fp8": {}, "lora": {"r": 4, "experts": True}}], ids=str
)
def test_a_run_under_deepspeed_is_one_under_ddp_and_resumes(checkpoints, tmp_path, adapters):
    plugins, saves = {**adapters, **PLUGINS}, {"save_strategy": "steps", "save_steps": 10}
    (ddp,) = run(2, "train", checkpoints["arctic"], tmp_path / "ddp", plugins)
    (whole,) = run(2, "train", checkpoints["arctic"], tmp_path, plugins, {**zero(2), **saves})
    assert whole["loss"] == pytest.approx(ddp["loss"], rel=1e-4)
    assert whole["grad_norm"] == pytest.approx(ddp["grad_norm"], rel=1e-4)
    (resumed,) = run(2, "resume", checkpoints["arctic"], tmp_path, plugins, zero(2))
    assert resumed["loss"] == whole["loss"]
    assert resumed["grad_norm"] == whole["grad_norm"]
    if not adapters:
        error = run(4, "resume", checkpoints["arctic"], tmp_path, {"moe": {"expert_parallel": 4}}, zero(2), fails=True)
        assert "expected as many processes per copy of the experts as when it was saved" in error
        assert "ZeRO stage 3" in run(
            2, "train", checkpoints["arctic"], tmp_path / "three", plugins, zero(3), fails=True
        )


@pytest.mark.parametrize("name", [pytest.param("mixtral", marks=pytest.mark.slow), "arctic"])
def test_a_run_resumes_where_it_stopped(checkpoints, tmp_path, name):
    (whole,) = run(2, "train", checkpoints[name], tmp_path, PLUGINS, {"save_strategy": "steps", "save_steps": 10})
    for rank in range(2):
        assert (tmp_path / "checkpoint-10" / f"experts_{rank}_of_2.pt").is_file()
    (resumed,) = run(2, "resume", checkpoints[name], tmp_path, PLUGINS)
    assert resumed["loss"] == whole["loss"], "also the steps before, which the checkpoint remembers"
    assert resumed["grad_norm"] == whole["grad_norm"]
    error = run(4, "resume", checkpoints[name], tmp_path, {"moe": {"expert_parallel": 4}}, fails=True)
    assert "has no experts_0_of_4.pt (files of this kind: experts_0_of_2.pt, experts_1_of_2.pt)" in error


@pytest.mark.parametrize("name", ["mixtral", "arctic"])
def test_a_run_of_one_process_resumes_too(checkpoints, tmp_path, name):
    """Checkpoints have one matrix for each expert, the model has not; transformers would leave experts as they were."""
    (whole,) = run(1, "train", checkpoints[name], tmp_path, {"moe": {}}, {"save_strategy": "steps", "save_steps": 10})
    (resumed,) = run(1, "resume", checkpoints[name], tmp_path, {"moe": {}})
    assert resumed["loss"] == whole["loss"]
    assert resumed["grad_norm"] == whole["grad_norm"]


@pytest.mark.parametrize(
    ("processes", "plugins", "options"),
    [
        (1, {"moe": {}}, {}),
        (2, PLUGINS, {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, PLUGINS, zero(2)), (2, {"fp8": {}, "lora": {"r": 4, "experts": True}, **PLUGINS}, {}))
        ),
    ],
    ids=str,
)
def test_the_best_model_is_back_at_the_end(checkpoints, tmp_path, processes, plugins, options):
    for found in run(processes, "best", checkpoints["arctic"], tmp_path, plugins, options):
        assert all(found["best"])
        assert not any(found["last"]), "the best differs from the last"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "unattached",
            (
                "DDP copied the first process's experts to all processes, because the trainer was not attached; "
                "call attach"
            ),
        ),
        ("only_experts", "training changes only experts, but DDP needs a trained parameter that all processes have"),
        (
            "half",
            (
                "training uses fp16, where every process would scale the loss differently, as gradients of experts "
                "differ; expected bf16"
            ),
        ),
    ],
)
def test_what_would_train_wrongly_is_refused(checkpoints, tmp_path, task, message):
    assert message in run(2, task, checkpoints["arctic"], tmp_path, PLUGINS, fails=True)


def test_processes_generate_texts_of_different_lengths(checkpoints):
    assert all(found["same"] for found in run(2, "generate", checkpoints["arctic"], PLUGINS))


def test_adapters_of_encoded_experts(checkpoints, tmp_path):
    plugins = {"fp8": {}, "lora": {"r": 4, "experts": True}}
    (alone,) = run(1, "train", checkpoints["arctic"], tmp_path / "alone", plugins, {"max_steps": 8})
    saves = {"max_steps": 8, "save_steps": 4, "save_strategy": "steps"}
    (found,) = run(2, "train", checkpoints["arctic"], tmp_path / "two", {**plugins, **PLUGINS}, saves)
    assert found["loss"][0] == pytest.approx(alone["loss"][0], rel=1e-4)
    assert found["grad_norm"][0] == pytest.approx(alone["grad_norm"][0], rel=0.5), (
        "the pairs are drawn otherwise, and start at nothing"
    )
    one, two = (load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("alone", "two"))
    assert {name: tensor.shape for name, tensor in one.items()} == {
        name: tensor.shape for name, tensor in two.items()
    }, "of all experts"
    pairs = [tensor for name, tensor in two.items() if ".experts." in name and "lora_B" in name]
    assert pairs
    assert all((tensor.unflatten(1, (4, 4)).abs().amax((0, 1)) > 0).all() for tensor in pairs), (
        "those of every expert were trained"
    )
    model, _ = load_model(checkpoints["arctic"], Stack.from_dict({"fp8": {}}))
    adapted = load_adapter(model, tmp_path / "two" / "final")
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():  # in one process, which does not hear of the two that trained
        assert torch.equal(load_checkpoint(tmp_path / "two" / "final")[0](ids).logits, adapted(ids).logits)
        assert (
            load_model(merge_adapter(tmp_path / "two" / "final", tmp_path / "merged"))[0](ids).logits.isfinite().all()
        )


@pytest.mark.parametrize("plugins", [{"fp8": {}, "offload": {"ratio": 1.0}}, {"fp8": {}, "shard": {}}], ids=str)
def test_experts_are_saved_whole_wherever_their_bytes_are(checkpoints, tmp_path, plugins):
    run(1, "save", checkpoints["mixtral"], tmp_path / "one", {"fp8": {}})
    run(2, "save", checkpoints["mixtral"], tmp_path / "two", {**plugins, **PLUGINS})
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8)) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_tokens_are_dropped_beyond_the_capacity(checkpoints, tmp_path):
    plugins = {"moe": {"expert_parallel": 2, "capacity_factor": 0.5}}
    (found,) = run(2, "train", checkpoints["arctic"], tmp_path, plugins, {"max_steps": 3})
    assert "moe/layer_0/dropped" in found["figures"]
    state = json.loads((tmp_path / "final" / "arctic_plugins.json").read_text())
    assert state["stack"]["moe"]["capacity_factor"] == 0.5
    model, _ = load_model(checkpoints["arctic"], Stack.from_dict({"moe": {"capacity_factor": 0.5}}))
    plain, _ = load_model(checkpoints["arctic"])
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, plain.eval()(ids).logits, atol=1e-4), (
            "nothing is dropped outside of training"
        )
        assert not torch.allclose(model.train()(ids).logits, plain.train()(ids).logits, atol=1e-2)


def test_what_cannot_be_divided_is_said_before_weights_are_read(checkpoints, tiny_checkpoint, monkeypatch):
    with pytest.raises(
        ConfigError, match="experts_implementation is 'eager', but a plugin dispatches the experts; expected 'arctic'"
    ):
        load_model(
            checkpoints["arctic"], Stack.from_dict({"moe": {"capacity_factor": 1.0}}), experts_implementation="eager"
        )
    with pytest.raises(
        ConfigError, match=r"expert_parallel is 2 with 1 process; expected a divisor of the number of processes"
    ):
        load_model(checkpoints["arctic"], Stack.from_dict(PLUGINS))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torch.distributed is not initialized"):
        load_model(checkpoints["arctic"], Stack.from_dict(PLUGINS))
    with pytest.raises(ClaimError, match="no experts that can be dispatched"):
        load_model(tiny_checkpoint, Stack.from_dict(PLUGINS))
    with pytest.raises(ConfigError, match="min_capacity is set, but capacity_factor is not"):
        load_model(checkpoints["arctic"], Stack.from_dict({"moe": {"min_capacity": 4}}))
    with pytest.raises(ConfigError, match="mixtral has no z-loss"):
        load_model(checkpoints["mixtral"], Stack.from_dict({"moe": {"router_z_loss_coef": 0.1}}))


def test_experts_that_processes_cannot_share_alike(checkpoints):
    error = run(3, "compare", checkpoints["arctic"], {}, fails=True)
    assert "expert_parallel is 3, but the model has 4 experts; expected a divisor of 4" in error
