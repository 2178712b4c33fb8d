"""Names and files of a real DeepSpeed-MoE run, made here by two processes, to Hugging Face's."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from arctic_plugins_deepspeed.checkpoints import convert_deepspeed
from arctic_plugins_deepspeed.config import DeepSpeedImport
from arctic_plugins_huggingface import register
from arctic_plugins_moe.configuration import ArcticConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from arctic_plugins.errors import CheckpointError
from arctic_plugins.testing import trainers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a model as it should come out, DeepSpeed's checkpoint of it)."""
    pytest.importorskip("deepspeed")
    register()
    directory = tmp_path_factory.mktemp("deepspeed")
    config = ArcticConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_layer_frequency=1,
        parallel_attn_mlp_res=True,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory / "model")
    script = Path(__file__).with_name("moe_run.py")
    environment = {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [script, directory / "model", directory / "run"]
    trainers().run(command, processes=2, timeout=900, environment=environment)
    shutil.copy(directory / "model" / "config.json", directory / "run")
    return directory / "model", directory / "run"


def test_every_tensor_comes_out_under_its_name(run, tmp_path):
    model, old = run
    lines = convert_deepspeed(old, tmp_path / "out")
    assert "12 expert files" in lines
    expected, found = (load_file(path / "model.safetensors") for path in (model, tmp_path / "out"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    one, other = (AutoModelForCausalLM.from_pretrained(path) for path in (model, tmp_path / "out"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)


def test_an_expert_that_is_missing_is_named(run, tmp_path):
    _, old = run
    copied = shutil.copytree(old, tmp_path / "run")
    (copied / "step" / "layer_1_expert_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"lacks expert files \(1\), for example "
        "layer_1_expert_2_mp_rank_00_model_states.pt; expected 4 for each mixture",
    ):
        convert_deepspeed(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = (copied / "config.json").read_text()
    (copied / "config.json").write_text(config.replace('"num_local_experts": 4', '"num_local_experts": 2'))
    with pytest.raises(CheckpointError, match=r"has layer_0_expert_2_.*; expected 2 experts \(config.json\)"):
        convert_deepspeed(copied, tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no lora_weight_1"):
        convert_deepspeed(old, tmp_path / "out", DeepSpeedImport(base="some/model"))
