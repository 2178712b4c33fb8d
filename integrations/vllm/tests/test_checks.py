"""Checks in vLLM's processes, however vLLM was started; and what it says about itself."""

import json

import pytest
from arctic_plugins_vllm import checks
from arctic_plugins_vllm.about import SERVED, served
from arctic_plugins_vllm.compat import EngineArgs
from prometheus_client import REGISTRY

from arctic_plugins import Stack
from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import CheckpointError, PluginLoadError, PluginNotFoundError
from arctic_plugins.provenance import FILE_NAME, write_provenance


@pytest.fixture
def checkpoint(tmp_path):
    write_provenance(tmp_path, Stack.from_dict({"fp8": {}}).to_dict())
    return tmp_path


def change(checkpoint, **changes):
    path = checkpoint / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def engine_config(checkpoint):
    """What `LLM`, `vllm serve` and `arctic serve` call first, for the checkpoint."""
    checks.install()  # as `register` does
    return EngineArgs(model=str(checkpoint)).create_engine_config


def test_a_plugin_that_is_not_installed_is_told_before_anything_is_read(checkpoint, engine_config):
    change(checkpoint, stack={"fp8": {}, "unheard": {}})
    with pytest.raises(PluginNotFoundError, match="made with the plugin unheard, not installed here"):
        engine_config()


def test_a_plugin_that_is_broken_is_told(checkpoint, engine_config, monkeypatch):
    broken = PluginLoadError("plugin 'fp8' of distribution arctic-plugins-fp8 0.1.0 cannot be imported")
    monkeypatch.setitem(process_registry().failures, "fp8", broken)
    with pytest.raises(PluginLoadError, match="fp8 .* cannot be imported"):
        engine_config()


def test_a_newer_format_is_refused(checkpoint, engine_config):
    change(checkpoint, format=2)
    with pytest.raises(CheckpointError, match="has format 2; expected at most 1; upgrade arctic-plugins"):
        engine_config()


def test_what_is_served_in_one_line(checkpoint):
    change(checkpoint, versions={"arctic-plugins": "0.1.0", "evil": "1\n2 \x1b[31m"})
    line = served(str(checkpoint), {SERVED: {"rope": {"factor": 4}}}).line()
    assert f"{checkpoint}: stack: fp8 " in line
    assert "rope " in line
    assert line.endswith("; written by arctic-plugins 0.1.0")
    assert served("some/model").line().endswith(" some/model: stack: none; not written by arctic-plugins")


def test_the_metric_of_several_engines_of_one_process(checkpoint):
    from types import SimpleNamespace

    from arctic_plugins_vllm.metrics import InfoLogger

    model = SimpleNamespace(model=str(checkpoint), served_model_name="mine")
    for names, additional in (("mine", {}), (["other", "more"], {SERVED: {"rope": {}}})):
        model.served_model_name = names
        InfoLogger(SimpleNamespace(model_config=model, additional_config=additional), [0, 1])
    stacks = {
        sample.labels["model_name"]: sample.labels["stack"]
        for metric in REGISTRY.collect()
        if metric.name == "arctic_plugins_info"
        for sample in metric.samples
    }
    assert stacks == {"mine": "fp8", "other": "fp8,rope"}
