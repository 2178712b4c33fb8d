"""What `arctic serve` would run, and what it refuses before it runs anything."""

import json

import pytest
import torch
from arctic_plugins_vllm import serving
from arctic_plugins_vllm.serving import server_command
from safetensors.torch import save_file

from arctic_plugins import Stack, compute
from arctic_plugins.cli import main
from arctic_plugins.errors import CheckpointError, ConfigError, PluginNotFoundError
from arctic_plugins.provenance import write_provenance
from arctic_plugins.testing import tiny_llama

ENCODED = {
    "model_type": "llama",
    "quantization_config": {"quant_method": "arctic", "format": 1, "codecs": {"fp8": {"type": "fp8", "bits": 8}}, "modules": {"*": "fp8"}},
}


def make(directory, config, *, adapter_of=None, plugins=None):
    directory.mkdir()
    if adapter_of is None:
        (directory / "config.json").write_text(json.dumps(config))
    else:
        (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(adapter_of), "r": 4}))
    if plugins is not None:
        write_provenance(directory, Stack.from_dict(plugins))
    return directory


@pytest.fixture
def base(tmp_path):
    return make(tmp_path / "base", ENCODED, plugins={"fp8": {}})


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Of a processor that multiplies bfloat16, whatever this one does."""
    monkeypatch.setattr(serving, "_runs_on_cpu", lambda: True)
    monkeypatch.setattr(serving, "is_native", lambda *_: True)


def flags(*arguments, **options):
    command, environment = server_command(*arguments, **options)
    assert command[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    return " ".join(command[2:]), environment


def test_a_checkpoint_needs_no_option(base, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    line, environment = flags(str(base))
    assert line == f"--model {base} --enforce-eager"
    assert environment == {"VLLM_CPU_KVCACHE_SPACE": "2"}
    monkeypatch.setattr(serving, "_runs_on_cpu", lambda: False)
    assert flags(str(base)) == (f"--model {base}", {})


def test_what_the_processor_does_not_multiply_is_served_in_float32(base, monkeypatch):
    for module in (serving, compute):
        monkeypatch.setattr(module, "is_native", lambda dtype, *_: dtype == torch.float32)
    assert flags(str(base))[0] == f"--model {base} --dtype float32 --enforce-eager"
    assert flags(str(base), ["--dtype", "bfloat16"])[0] == f"--model {base} --enforce-eager --dtype bfloat16"


def test_what_the_user_says_wins(base, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    line, environment = flags(str(base), ["--port", "1234", "--model=other", "--no-enforce-eager"])
    assert line == "--port 1234 --model=other --no-enforce-eager"
    assert environment == {}


def test_an_adapter_is_served_over_its_encoded_base(base, tmp_path):
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {}, "lora": {"r": 4}})
    line, _ = flags(str(adapter))
    assert line == f"--model {base} --enable-lora --max-lora-rank 8 --lora-modules adapter={adapter} --enforce-eager"


def test_an_adapter_over_a_plain_base_says_how_to_encode_it(base, tmp_path):
    plain = make(tmp_path / "plain", {})
    adapter = make(tmp_path / "adapter", None, adapter_of=plain, plugins={"fp8": {}, "lora": {"r": 4}})
    with pytest.raises(ConfigError, match=f"its base {plain} is plain; 'arctic quantize {plain} BASE --plugins fp8' and 'arctic serve"):
        server_command(str(adapter))
    assert f"--model {base}" in flags(str(adapter), base=str(base))[0]
    unencoded = make(tmp_path / "unencoded", None, adapter_of=plain, plugins={"lora": {"r": 4}})
    assert f"--model {plain} --enable-lora" in flags(str(unencoded))[0]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, CheckpointError, "has no config.json; expected a checkpoint directory"),
        (
            {"quantization_config": {**ENCODED["quantization_config"], "codecs": {"x": {"type": "fp3"}}}},
            PluginNotFoundError,
            "pip install arctic-plugins-fp3",
        ),
        ({"quantization_config": {**ENCODED["quantization_config"], "codecs": {"x": {"type": "fp8", "bits": 3}}}}, CheckpointError, "is not valid"),
        ({"quantization_config": {**ENCODED["quantization_config"], "format": 2}}, CheckpointError, "has format 2; expected at most 1"),
    ],
)
def test_what_cannot_be_served_is_said_before_the_server_starts(tmp_path, config, error, message):
    directory = tmp_path / "nothing" if config is None else make(tmp_path / "checkpoint", config)
    with pytest.raises(error, match=message):
        server_command(str(directory))


def test_a_base_that_is_encoded_otherwise_is_not_served_under_the_adapter(base, tmp_path):
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {"group_size": 64}, "lora": {"r": 4}})
    with pytest.raises(ConfigError, match="was trained over weights encoded by .*'group_size': 64.*, and .* was made with .*'group_size': 'channel'"):
        server_command(str(adapter), base=str(base))


def test_a_damaged_adapter_is_not_served(base, tmp_path):
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {}, "lora": {"r": 4}})
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json (has 1 bytes|is not valid JSON)"):
        server_command(str(adapter))


def test_base_is_for_adapters(base):
    with pytest.raises(ConfigError, match="--base is for adapters"):
        server_command(str(base), base=str(base))


def test_a_hub_id_goes_to_vllm_as_it_is():
    assert flags("some/model")[0] == "--model some/model"


def test_an_adapter_of_another_program_says_so(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"is an adapter without arctic_plugins\.json"):
        server_command(str(make(tmp_path / "adapter", None, adapter_of=base)))


def test_an_adapter_is_named_after_its_directory_wherever_one_stands(base, tmp_path, monkeypatch):
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {}, "lora": {"r": 4}})
    monkeypatch.chdir(adapter)
    assert f"--lora-modules adapter={adapter} --enforce-eager" in flags(".")[0]


@pytest.mark.parametrize("options", [["--model", "BASE"], ["--model=BASE"]])
def test_the_base_of_an_adapter_may_be_given_as_vllms_model(base, tmp_path, options):
    adapter = make(tmp_path / "adapter", None, adapter_of=make(tmp_path / "plain", {}), plugins={"fp8": {}, "lora": {"r": 4}})
    options = [option.replace("BASE", str(base)) for option in options]
    assert flags(str(adapter), options)[0].endswith(" ".join(options))


def test_the_checkpoint_comes_before_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--port", "8000", "checkpoint"])
    assert stopped.value.code == 2
    assert "--port stands where CHECKPOINT is expected" in capsys.readouterr().err


def test_a_plain_model_is_encoded_on_the_fly(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    plain = tiny_llama(tmp_path / "plain")
    line, _ = flags(str(plain), plugins=Stack.from_dict({"fp8": {"include": ["**.mlp.*"], "group_size": 64}}))
    start, _, overrides = line.partition(" --hf-overrides ")
    assert start == f"--model {plain}"
    assert overrides.endswith("--enforce-eager")
    found = json.loads(overrides.removesuffix("--enforce-eager"))["quantization_config"]
    assert found == {
        "quant_method": "arctic",
        "format": 1,
        "on_the_fly": True,
        "codecs": {"fp8": {"type": "fp8", "bits": 8, "group_size": 64, "scale": "max", "activations": "full"}},
        "modules": {f"model.layers.*.mlp.{leaf}_proj": "fp8" for leaf in ("gate", "up", "down")},
    }


def test_what_cannot_be_encoded_on_the_fly_is_told(base, tmp_path):
    plain, fp8 = tiny_llama(tmp_path / "plain"), Stack.from_dict({"fp8": {}})
    encoded = make(tmp_path / "encoded", ENCODED)
    save_file({}, encoded / "model.safetensors")
    with pytest.raises(ConfigError, match="is quantized already"):
        server_command(str(encoded), plugins=fp8)
    with pytest.raises(ConfigError, match="the plugins change nothing"):
        server_command(str(plain), plugins=Stack.from_dict({"lora": {}}))
    with pytest.raises(ConfigError, match="--plugins and --hf-overrides both"):
        server_command(str(plain), ["--hf-overrides={}"], plugins=fp8)
    with pytest.raises(ConfigError, match="--plugins is for models"):
        server_command(str(make(tmp_path / "adapter", None, adapter_of=base, plugins={"lora": {}})), plugins=fp8)
