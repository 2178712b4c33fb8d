"""DeepSpeed's LoRA checkpoints, made as the original stack made them, to adapters and merged models."""

import json
import math

import pytest
import torch
from arctic_plugins_deepspeed.checkpoints import convert_deepspeed
from arctic_plugins_deepspeed.config import DeepSpeedImport
from arctic_plugins_huggingface import load_model, merge_adapter
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from transformers import AutoModelForCausalLM

from arctic_plugins.cli import main
from arctic_plugins.errors import CheckpointError, CodecError, ConfigError

IDS = torch.arange(10, 42)[None]
RANK, ALPHA = 4, 8


@pytest.fixture
def make_run(tiny_checkpoint, tmp_path):
    """A function that writes a run of ``processes`` and gives (its directory, the state dict that it should become)."""

    def make(processes=2, *, scaling=ALPHA / RANK, flat=False, nested=True):
        model, tokenizer = load_model(tiny_checkpoint)
        states, generator = model.state_dict(), torch.Generator().manual_seed(0)
        module, shards, merged = {}, [{} for _ in range(processes)], {}
        for name, tensor in states.items():
            if "_proj." not in name:
                module[name] = merged[name] = tensor
                continue
            rows, columns = tensor.shape
            down, up = (
                torch.randn(RANK, columns, generator=generator) * 0.1,
                torch.randn(rows, RANK, generator=generator) * 0.1,
            )
            prefix = name.removesuffix(".weight")
            module[f"{prefix}.lora_weight_1.weight"], module[f"{prefix}.lora_weight_2.weight"] = down, up
            merged[name] = tensor + scaling * up @ down
            for shard, part in zip(
                shards, (tensor.reshape(-1) if flat else tensor).chunk(processes, dim=0 if flat else 1), strict=True
            ):
                shard[name] = part.clone()
        step = tmp_path / "run" / "global_step7"
        step.mkdir(parents=True)
        torch.save(
            {"module": module, "dp_world_size": processes, "ds_version": "0.15"} if nested else module,
            step / "mp_rank_00_model_states.pt",
        )
        for rank, shard in enumerate(shards):
            torch.save(shard, step / f"lora_optimized_linear_sharding_rank_{rank}.pt")
        config = json.loads((tiny_checkpoint / "config.json").read_text()) | {
            "ds_lora": {"lora_r": RANK, "lora_alpha": ALPHA},
            "ds_quantization": None,
        }
        (step.parent / "config.json").write_text(json.dumps(config))
        (step.parent / "latest").write_text("global_step7")
        tokenizer.save_pretrained(step.parent)
        return step.parent, merged

    return make


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_merged_model(make_run, tmp_path, processes, flat):
    run, merged = make_run(processes, flat=flat)
    (line, parts) = convert_deepspeed(run, tmp_path / "out")
    assert f"14 updates of rank {RANK}, scaled by 2 (alpha/r)" in line
    assert parts.startswith(f"{processes} parts")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], msg=name)
    assert not any(key.startswith("ds_") for key in json.loads((tmp_path / "out" / "config.json").read_text()))
    load_checkpoint(tmp_path / "out")  # tokenizer and provenance are there


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_an_adapter_on_the_base_merges_to_the_same(make_run, tiny_checkpoint, tmp_path, scaling, capsys):
    run, merged = make_run(scaling=ALPHA / (RANK if scaling == "alpha/r" else math.sqrt(RANK)))
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "convert",
                str(run),
                str(tmp_path / "adapter"),
                "--from",
                "deepspeed",
                "--scaling",
                scaling,
                "--base",
                str(tiny_checkpoint),
            ]
        )
    assert stopped.value.code == 0, capsys.readouterr().err
    adapted, _ = load_checkpoint(tmp_path / "adapter")
    together, _ = load_model(merge_adapter(tmp_path / "adapter", tmp_path / "merged"))
    for name, tensor in together.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], msg=name)
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(IDS).logits, together.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


def test_large_checkpoints_are_several_files(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr("arctic_plugins_deepspeed.checkpoints.SHARD_SIZE", "100KB")
    run, merged = make_run()
    convert_deepspeed(run, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    model, _ = load_model(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], msg=name)


class Unwelcome:
    def __reduce__(self):
        return (print, ("a pickle ran this",))


def test_a_pickle_that_wants_more_is_refused_and_not_run(make_run, tmp_path, capsys):
    run, _ = make_run()
    path = run / "global_step7" / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "args": Unwelcome()}, path)
    with pytest.raises(CheckpointError, match=r"is a pickle that would run code.*print"):
        convert_deepspeed(run, tmp_path / "out")
    assert "a pickle ran this" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["part", "config", "alpha", "half", "step", "number", "cut"])
def test_what_is_missing_is_named(make_run, tmp_path, what):
    run, _ = make_run(4)
    step = run / "global_step7"
    first, message = step / "lora_optimized_linear_sharding_rank_0.pt", ""
    if what == "part":
        (step / "lora_optimized_linear_sharding_rank_3.pt").unlink()
        message = r"the parts of model\.layers\.0.*weight add up to"
    elif what == "number":
        first.unlink()
        message = r"has the parts \[1, 2, 3\]; expected consecutive numbers from 0"
    elif what == "cut":
        first.write_bytes(first.read_bytes()[:1000])
        message = "rank_0.pt cannot be read"
    elif what == "config":
        (run / "config.json").unlink()
        message = "has a config.json"
    elif what == "alpha":
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "ds_lora"}))
        message = "no ds_lora.lora_alpha; expected the alpha that was used in training; pass it with --alpha"
    elif what == "half":
        content = torch.load(step / "mp_rank_00_model_states.pt", weights_only=True)
        del content["module"]["model.layers.0.mlp.up_proj.lora_weight_2.weight"]
        torch.save(content, step / "mp_rank_00_model_states.pt")
        message = r"model\.layers\.0\.mlp\.up_proj has lora_weight_1 .* and lora_weight_2 None"
    else:
        (step / "mp_rank_00_model_states.pt").unlink()
        message = "has no mp_rank_00_model_states.pt"
    with pytest.raises(CheckpointError, match=message):
        convert_deepspeed(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if what == "alpha":
        convert_deepspeed(run, tmp_path / "out", DeepSpeedImport(alpha=ALPHA))


def test_a_diverged_update_and_an_existing_directory(make_run, tmp_path):
    run, _ = make_run()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        convert_deepspeed(run, run)
    path = run / "global_step7" / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)
    content["module"]["model.layers.0.mlp.up_proj.lora_weight_2.weight"][0, 0] = float("nan")
    torch.save(content, path)
    with pytest.raises(CodecError, match=r"model\.layers\.0\.mlp\.up_proj: the merged weight contains NaN or Inf"):
        convert_deepspeed(run, tmp_path / "out")
