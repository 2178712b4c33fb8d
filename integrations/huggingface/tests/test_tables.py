"""The plan of a run on a terminal of 80 columns: nothing is cut, and what can be said shortly is."""

import re

import pytest
from arctic_plugins_huggingface.training.dry_run import ModuleGroup, RunPlan, show_plan
from rich.console import Console

FP8 = "fp8 (bits 8, group_size channel)"


@pytest.fixture
def shown(capsys):
    """A function that prints a plan of these modules and gives its lines."""

    def show(*modules):
        settings = [
            {
                "plugin": "fp8",
                "key": "exclude",
                "value": ("lm_head", "**.router", "**.shared_expert_gate") * 2,
                "source": "default",
            }
        ]
        show_plan(
            RunPlan(settings, list(modules), 1000, 10, 7, 37, "37 rows", "computing in float32", [], [], {"base": 10}),
            Console(width=80),
        )
        return capsys.readouterr().out.splitlines()

    return show


def module(pattern, layers=(), shape=(64, 32), codec=FP8, placement=None, adapter=768, resident=2_000_000):
    return ModuleGroup(
        pattern, tuple(layers), max(1, len(layers)), shape, codec, placement, adapter, 2_000_000, resident
    )


def row(lines, name):
    (found,) = (line for line in lines if line.split(" ")[0] == name)
    return re.split(r"  +", found.rstrip())


def test_layers_are_numbers_and_patterns_names(shown):
    lines = shown(
        module("model.layers.*.self_attn.q_proj", range(30), (1536, 576)),
        module("lm_head", shape=(49152, 576), codec=None, adapter=0),
    )
    assert row(lines, "self_attn.q_proj") == ["self_attn.q_proj", "0-29", "1536 x 576", "768 each", "2.00"]
    assert row(lines, "lm_head") == ["lm_head", "49152 x 576", "2.00"]
    assert "linear modules; layer numbers refer to model.layers" in lines


def test_columns_that_say_nothing_are_left_out(shown):
    text = "\n".join(shown(module("model.layers.*.mlp.up_proj", range(2), adapter=0)))
    assert not any(word in text for word in ("placement", "resident", "adapter", "count"))


def test_layers_that_differ_share_a_row_with_those_that_are_alike(shown):
    away = [
        module(f"model.layers.{layer}.mlp.up_proj", [layer], placement="in host memory", resident=0)
        for layer in (0, 4, 8)
    ]
    here = [module(f"model.layers.{layer}.mlp.up_proj", [layer]) for layer in (1, 2, 3, 5, 6, 7)]
    lines = shown(*away, *here)
    text = "\n".join(lines)
    host, _, resident = text.partition(f"{FP8}, in host memory")[2].partition(f"\n{FP8} ")
    assert row(host.splitlines(), "mlp.up_proj") == ["mlp.up_proj", "0, 4, 8", "64 x 32", "768 each", "6.00", "0.00"]
    assert row(resident.splitlines(), "mlp.up_proj") == ["mlp.up_proj", "1-3, 5-7", "64 x 32", "768 each", "12.00"]


def test_names_fold_at_their_dots_and_nothing_is_wider_than_the_terminal(shown):
    long = module(
        "model.layers.*.block_sparse_moe.experts.gate_up_proj",
        range(0, 96, 2),
        (128, 28672, 7168),
        placement="in host memory",
        resident=0,
    )
    lines = shown(long, module("visual.blocks.*.attention.qkv", range(4)))
    assert all(len(line) <= 80 for line in lines)
    assert [line.split(" ")[0] for line in lines if "block_sparse_moe" in line or "gate_up_proj" in line] == [
        "block_sparse_moe.",
        "experts.gate_up_proj",
    ]
    text = "\n".join(lines)
    assert "…" not in text
    assert "  0-94 step 2  128 x 28672 x 7168  768 each  2.00      0.00" in text
