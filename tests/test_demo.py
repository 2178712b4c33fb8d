"""The main job, on the real model: `arctic demo`."""

import pytest
import torch
from arctic_plugins_huggingface import load_model
from arctic_plugins_huggingface.demo.model import smollm2
from arctic_plugins_huggingface.demo.run import one_of_each_kind
from arctic_plugins_huggingface.demo.serving import Server
from arctic_plugins_huggingface.demo.text_to_sql import generate

from arctic_plugins.errors import ArcticError
from arctic_plugins.provenance import FILE_NAME


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
    assert (model.arctic_stored_dtype or model.dtype) == torch.bfloat16
    assert 134e6 < model.num_parameters() < 136e6
    assert tokenizer.chat_template
