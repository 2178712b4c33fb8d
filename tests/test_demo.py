"""The main job, on the real model: `arctic demo`."""

import json
import os
import subprocess
import sys

import pytest
import torch
from arctic_plugins_huggingface import load_model
from arctic_plugins_huggingface.demo.model import smollm2
from arctic_plugins_huggingface.demo.run import one_of_each_kind
from arctic_plugins_huggingface.demo.serving import Server
from arctic_plugins_huggingface.demo.text_to_sql import generate

from arctic_plugins.errors import ArcticError
from arctic_plugins.provenance import FILE_NAME
from arctic_plugins.resolver import host_version


def test_the_questions_served_are_of_different_kinds():
    questions = one_of_each_kind(generate(72, seed=0, split="test"), 3)
    assert len({example.template for example in questions}) == 3


def test_a_server_that_ends_says_why(tmp_path):
    with pytest.raises(ArcticError, match="the server ended: .*has no config.json"), Server(tmp_path / "nowhere", tmp_path / "log", timeout=60):
        pass


def test_the_model_is_made_once(tmp_path):
    """The real SmolLM2, from the package that ships it (or the hub)."""
    directory = smollm2(tmp_path)
    assert (directory / FILE_NAME).is_file()
    stamp = (directory / "model.safetensors").stat().st_mtime_ns
    assert smollm2(tmp_path) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == stamp
    model, tokenizer = load_model(directory)
    assert model.dtype == torch.bfloat16
    assert 134e6 < model.num_parameters() < 136e6
    assert tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(host_version("vllm") is None, reason="vLLM is not installed")
def test_the_demo_does_its_main_job(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "arctic_plugins.cli", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=2400, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((out / "report.json").read_text())

    def percent(when):
        return 100 * sum(right for right, _ in report["scores"][when].values()) / sum(total for _, total in report["scores"][when].values())

    assert sum(total for _, total in report["scores"]["before"].values()) >= 60
    assert percent("after") - percent("before") >= 60
    assert percent("merged") >= percent("after") - 15
    assert {"join_where", "group_count", "order", "aggregate"} <= report["scores"]["after"].keys()
    assert report["losses"][-1][1] < report["losses"][0][1] / 5
    assert 0.5 <= report["encoded_bytes"] / report["plain_bytes"] < 0.51
    assert len(report["served"]) == 3
    assert (out / "loss.png").stat().st_size > 5000
    assert "accuracy" in done.stdout
