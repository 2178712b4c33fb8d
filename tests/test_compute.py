"""Computing in the dtype that the hardware multiplies: `dtype: auto` asks it, what the user says wins, and nothing of
it reaches the disk.
"""

import json

import pytest
import torch
from arctic_plugins_huggingface import load_model, save_checkpoint
from arctic_plugins_huggingface.loading.config import STORED
from arctic_plugins_huggingface.training.arguments import training_arguments
from arctic_plugins_huggingface.training.recipe import Recipe
from safetensors import safe_open

from arctic_plugins import Stack, compute
from arctic_plugins.compute import compute_dtype, is_native
from arctic_plugins.testing import run_python, tiny_llama

ORDINARY = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture(scope="module")
def bfloat16_checkpoint(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "bfloat16", dtype="bfloat16")


@pytest.fixture
def ordinary(monkeypatch):
    """A processor without bfloat16: what the library says of it is all that the policy knows."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


def dtypes(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118


def test_a_processor_with_the_instructions_of_avx2_computes_in_float32():
    code = (
        "import torch; from arctic_plugins.compute import *; print([str(compute_dtype(d)) for d in "
        "(torch.bfloat16, torch.float16)])"
    )
    done = run_python("-c", code, environment=ORDINARY)
    assert json.loads(done.stdout.replace("'", '"')) == ["torch.float32"] * 2


def test_float32_is_always_native():
    assert is_native(torch.float32)
    assert compute_dtype(torch.float64) == torch.float64


def test_auto_loads_wide_and_saves_as_it_was(ordinary, bfloat16_checkpoint, tmp_path, caplog):
    model, tokenizer = load_model(bfloat16_checkpoint)
    assert model.dtype == torch.float32
    assert "computing in float32: the checkpoint is in bfloat16" in caplog.text
    before = model.lm_head.weight.data_ptr()
    save_checkpoint(model, tokenizer, tmp_path / "saved", Stack())
    assert dtypes(tmp_path / "saved") == dtypes(bfloat16_checkpoint)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == before


@pytest.mark.parametrize("plugins", [{"fp8": {}}, {"offload": {"ratio": 0.5}}, {"fp8": {}, "offload": {"ratio": 1.0}}])
def test_what_is_written_does_not_depend_on_the_processor(bfloat16_checkpoint, tmp_path, plugins, monkeypatch):
    stack = Stack.from_dict(plugins)
    save_checkpoint(*load_model(bfloat16_checkpoint, stack, dtype=STORED), tmp_path / "stored", stack)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    save_checkpoint(*load_model(bfloat16_checkpoint, stack), tmp_path / "auto", stack)
    assert (tmp_path / "auto" / "model.safetensors").read_bytes() == (
        tmp_path / "stored" / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "auto" / "config.json").read_text() == (tmp_path / "stored" / "config.json").read_text()


def test_what_the_user_says_wins_with_a_warning(ordinary, bfloat16_checkpoint, caplog):
    model, _ = load_model(bfloat16_checkpoint, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert "slower than float32" in caplog.text


def test_autocast_follows_unless_the_user_turns_it_on(ordinary, tmp_path, caplog):
    def arguments(**training):
        recipe = {
            "model": "x",
            "data": {"path": "d.jsonl"},
            "training": {"output_dir": str(tmp_path), "use_cpu": True, **training},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        return training_arguments(Recipe.from_file(tmp_path / "recipe.yaml"))

    assert arguments().bf16 is False
    assert not caplog.text
    assert arguments(bf16=True).bf16 is True
    assert "training.bf16 asks for bfloat16" in caplog.text


def test_products_are_measured_in_each_dtype():
    assert set(compute.measure_products(16, 1)) == {"float32", "bfloat16", "float16"}
