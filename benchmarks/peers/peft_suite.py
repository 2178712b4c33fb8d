"""A pytest plugin that runs PEFT's own tests over plain or encoded models, without a network.

README.md in this folder says how. Models from the Hub are replaced by random ones of the same architecture. With
``--base '{"fp8": {}}'``, each is encoded as soon as it is loaded, and the small modules that PEFT's tests define
themselves are encoded as soon as they are made.
"""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from arctic_plugins_huggingface import freeze
from arctic_plugins_huggingface.loading import register
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from arctic_plugins import Stack
from arctic_plugins.frozen import Codec, FrozenLinear
from arctic_plugins.testing import tiny_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (
        "llama",
        {
            "hidden_size": 16,
            "intermediate_size": 64,
            "head_dim": 4,
            "vocab_size": 32000,
            "initializer_range": 0.02,
            "pad_token_id": 31000,
        },
    ),
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "opt",
        {
            "hidden_size": 16,
            "ffn_dim": 32,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 5,
            "vocab_size": 50265,
            "init_std": 0.02,
            "pad_token_id": 50000,
        },
    ),
}
"""Hub id -> (model_type, config), for :func:`tiny_model`. The tests feed token 1, so it must not be the padding, whose
embedding is zero."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--base``."""
    parser.addoption("--base", default="{}", help="plugins as in a recipe, in JSON; none for plain models")


def pytest_configure(config: pytest.Config) -> None:
    """Load models of :data:`MODELS` where PEFT's tests load them from the Hub."""
    if find_spec("diffusers") is None:  # which the tests import for models that are not tried here
        sys.modules["diffusers"] = absent = ModuleType("diffusers")
        absent.__spec__ = ModuleSpec("diffusers", None)
        absent.__dict__["StableDiffusionPipeline"] = type("StableDiffusionPipeline", (), {})
    register()
    directory = Path(tempfile.mkdtemp())
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    stack = Stack.from_dict(json.loads(config.getoption("--base")))

    @functools.cache
    def local(name: str) -> str:
        model_type, options = MODELS[name]
        return str(tiny_model(directory / name.replace("/", "--"), model_type, **options))

    load_model, load_tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained

    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
        if name not in MODELS:
            return load_model(name, *args, **kwargs)
        model = load_model(local(name), *args, **kwargs)
        model.name_or_path = model.config._name_or_path = name
        return freeze(model, stack)

    AutoModelForCausalLM.from_pretrained = from_pretrained
    AutoTokenizer.from_pretrained = lambda name, *args, **kwargs: load_tokenizer(
        local(name) if name in MODELS else name, *args, **kwargs
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Encode what the tests' own factories of modules return."""
    stack = Stack.from_dict(json.loads(config.getoption("--base")))
    if not len(stack):
        return
    codec = _codec(stack)
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        if (mock := getattr(module, "MockTransformerWrapper", None)) is not None:
            mock.from_pretrained = _encoding(mock.from_pretrained, codec)
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__ and "get_model" in vars(kind):
                kind.get_model = _encoding(kind.get_model, codec)


def _codec(stack: Stack) -> Codec:
    """Return the codec that ``stack`` gives to a linear module."""
    with tempfile.TemporaryDirectory() as directory:
        model = AutoModelForCausalLM.from_pretrained(tiny_model(directory, "llama", num_hidden_layers=1))
    return next(module.codec for module in freeze(model, stack).modules() if isinstance(module, FrozenLinear))


def _encoding(make: Callable[..., Any], codec: Codec) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        model = make(*args, **kwargs)
        for name, module in list(model.named_modules()) if isinstance(model, nn.Module) else ():
            if type(module) is nn.Linear and name:
                frozen = FrozenLinear.from_linear(module, codec, name=name)
                frozen.encode(module.weight.detach())
                model.set_submodule(name, frozen)
        return model

    return made
