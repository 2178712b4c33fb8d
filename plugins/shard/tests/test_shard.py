"""Parts of weights in several real processes (gloo): whole again bit for bit, and errors instead of deadlocks."""

import json
from pathlib import Path

import pytest
import torch
from arctic_plugins_huggingface import load_model
from arctic_plugins_shard.placement import _part

from arctic_plugins import Stack
from arctic_plugins.errors import ClaimError, ConfigError
from arctic_plugins.testing import run_processes

SCRIPT = Path(__file__).with_name("processes.py")


def run(processes, task, *arguments, timeout=300):
    """``task`` of ``processes.py`` in so many processes; their standard output together, and the exit status."""
    done = run_processes(SCRIPT, processes, task, *arguments, timeout=timeout, status=None)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("nbytes", [0, 1, 15, 16, 17, 1000, 4096])
def test_parts_cover_everything_and_little_more(size, nbytes):
    part = _part(nbytes, size)
    assert part % 16 == 0
    assert nbytes <= part * size < nbytes + 16 * size


def test_it_keeps_the_laws_of_placements(tmp_path):
    status, out, err = run(2, "laws", tmp_path)
    assert status == 0, err[-3000:]
    assert out.splitlines() == ['{"checked": true}'] * 2


@pytest.mark.parametrize("processes", [2, 3])
def test_logits_are_bitwise_those_of_one_process(processes, tiny_checkpoint):
    status, out, err = run(processes, "logits", tiny_checkpoint)
    assert status == 0, err[-3000:]
    for line in filter(None, out.splitlines()):
        found = json.loads(line)
        assert found["equal"], found
        assert found["kept"] <= found["whole"] / processes + 16 * found["weights"], (
            "no process keeps what it should not"
        )
    assert len(out.splitlines()) == 7 * processes


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_module_that_one_process_skips_is_named(tiny_checkpoint, prefetch):
    status, _, err = run(2, "skip", tiny_checkpoint, prefetch)
    assert status != 0
    later = "down" if prefetch == 3 else "up"  # what was gathered ahead is used before the others are asked again
    assert (
        f"rank 0 is at model.layers.0.mlp.gate_proj.weight while rank 1 is at model.layers.0.mlp.{later}_proj.weight"
        in err
    )
    assert (
        f"rank 1 is at model.layers.0.mlp.{later}_proj.weight while rank 0 is at model.layers.0.mlp.gate_proj.weight"
        in err
    )


def test_on_a_gpu_that_is_traced_parts_arrive_in_time_and_the_ring_stays(tiny_checkpoint):
    status, out, err = run(2, "traced", tiny_checkpoint)
    assert status == 0, err[-3000:]
    found = [json.loads(line) for line in out.splitlines()]
    assert found == [{"equal": True, "errors": [], "bounded": True}] * 8


def test_on_a_gpu_that_is_traced_a_skipped_module_is_named(tiny_checkpoint):
    status, _, err = run(2, "skip_traced", tiny_checkpoint, 1)
    assert status != 0
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    named = [f"rank 0 is at {gate} while rank 1 is at {up}", f"rank 1 is at {up} while rank 0 is at {gate}"]
    assert any(f"ShardError: {line}" in err for line in named), "gloo blocks, so perhaps only one of them gets there"


def test_a_process_that_waits_too_long_says_for_what(tiny_checkpoint):
    status, out, _ = run(2, "absent", tiny_checkpoint)
    assert status == 0
    assert "waited for the others to reach model.layers.0.self_attn.q_proj.weight" in out


def test_a_whole_model_is_saved_through_the_first_process(tiny_checkpoint, tmp_path):
    status, _, err = run(2, "save", tiny_checkpoint, tmp_path / "saved")
    assert status == 0, err[-3000:]
    expected, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}}))
    found, _ = load_model(tmp_path / "saved")
    for (name, one), (_, other) in zip(expected.state_dict().items(), found.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_one_process_shards_nothing_and_says_so(tiny_checkpoint, caplog):
    model, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "shard": {}}))
    assert model.model.layers[0].mlp.up_proj.handle is None
    assert "there is only one process, so nothing is sharded" in caplog.text


def test_processes_that_do_not_know_each_other(tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes were started, but torch.distributed is not initialized"):
        load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "shard": {}}))
    with pytest.raises(ConfigError, match=r"group_size is 3 with 4 processes; expected a divisor of 4"):
        load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "shard": {"group_size": 3}}))


def test_patterns_that_match_nothing(tiny_checkpoint):
    with pytest.raises(ClaimError, match=r"plugins.shard.include '\*\*.mlpp' matches no linear module"):
        load_model(tiny_checkpoint, Stack.from_dict({"fp8": {}, "shard": {"include": ["**.mlpp"]}}))
