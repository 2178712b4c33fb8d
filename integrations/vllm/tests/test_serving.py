"""What `arctic serve` would run, and what it refuses before it runs anything."""

import json
import socket

import pytest
import torch
from arctic_plugins_vllm import serving
from arctic_plugins_vllm.server import parse
from arctic_plugins_vllm.serving import READ, engine_args, server_options
from safetensors.torch import save_file

from arctic_plugins import Plugin, PluginConfig, Stack, compute, hookimpl
from arctic_plugins.cli import main
from arctic_plugins.errors import CheckpointError, ConfigError, PluginNotFoundError
from arctic_plugins.provenance import write_provenance
from arctic_plugins.testing import engines, small_engine, tiny_llama

ENCODED = {
    "model_type": "llama",
    "quantization_config": {
        "quant_method": "arctic",
        "format": 1,
        "codecs": {"fp8": {"type": "fp8", "bits": 8}},
        "modules": {"*": "fp8"},
    },
}


def make(directory, config, *, adapter_of=None, plugins=None):
    directory.mkdir()
    if adapter_of is None:
        (directory / "config.json").write_text(json.dumps(config))
    else:
        (directory / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": str(adapter_of), "r": 4, "lora_alpha": 8})
        )
        save_file(
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 8)},
            directory / "adapter_model.safetensors",
        )
    if plugins is not None:
        write_provenance(directory, Stack.from_dict(plugins).to_dict())
    return directory


@pytest.fixture
def base(tmp_path):
    return make(tmp_path / "base", ENCODED, plugins={"fp8": {}})


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Of a processor that multiplies bfloat16, whatever this one does."""
    monkeypatch.setattr(serving, "_runs_on_cpu", lambda: True)
    monkeypatch.setattr(serving, "is_native", lambda *_: True)


def test_a_checkpoint_needs_no_option(base, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert server_options(str(base)) == (
        {**READ, "model": str(base), "enforce_eager": True},
        {"VLLM_CPU_KVCACHE_SPACE": "2"},
    )
    monkeypatch.setattr(serving, "_runs_on_cpu", lambda: False)
    assert server_options(str(base)) == ({**READ, "model": str(base)}, {})


def test_what_the_processor_does_not_multiply_is_served_in_float32(base, monkeypatch):
    for module in (serving, compute):
        monkeypatch.setattr(module, "is_native", lambda dtype, *_: dtype == torch.float32)
    assert server_options(str(base))[0] == {**READ, "model": str(base), "dtype": "float32", "enforce_eager": True}
    assert "dtype" not in server_options(str(base), ["--dtype", "bfloat16"])[0]


def test_what_the_user_says_wins(base, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    options = ["--port", "1234", "--model=other", "--no-enforce-eager", "--lora-modules", "mine=here"]
    values, environment = server_options(str(base), options)
    assert environment == {}
    args = parse({**values, "max_lora_rank": 8, "lora_modules": [{"name": "adapter", "path": "there"}]}, options)
    assert (args.port, args.model, args.enforce_eager, args.max_lora_rank) == (1234, "other", False, 8)
    assert [(module.name, module.path) for module in args.lora_modules] == [("mine", "here")]


def test_a_value_is_never_read_as_an_option(tmp_path):
    """What an adapter's file says, spelled as the flags that made vLLM import a file: a value stays one, whatever it
    looks like.
    """
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    flags = [
        f"--tool-parser-plugin={evil}",
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
        "--trust-remote-code",
    ]
    modules = [{"name": flags[0], "path": flags[1]}]
    args = parse(
        {
            "model": flags[3],
            "lora_target_modules": flags,
            "lora_modules": modules,
            "hf_overrides": {flags[0]: flags[1]},
        },
        ["--port", "1234"],
    )
    assert args.lora_target_modules == flags
    assert (args.model, args.lora_modules[0].name, args.hf_overrides) == (flags[3], flags[0], {flags[0]: flags[1]})
    assert (args.trust_remote_code, args.tool_parser_plugin, args.enable_auto_tool_choice, args.tool_call_parser) == (
        False,
        "",
        False,
        None,
    )
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ConfigError, match="sets vLLM's option 'maximum_rank', which this version does not have"):
        parse({"maximum_rank": 8}, [])


@pytest.mark.parametrize(
    ("architecture", "options", "runner"),
    [
        ("LlamaModel", [], "pooling"),
        ("BertModel", [], "pooling"),
        ("LlamaModel", ["--runner", "generate"], None),
        ("LlamaForCausalLM", [], None),
        ("LlamaForSequenceClassification", [], None),  # vLLM knows by itself
        ("GPT2LMHeadModel", [], None),
    ],
)
def test_a_model_without_a_head_gives_embeddings(tmp_path, architecture, options, runner):
    checkpoint = make(tmp_path / "model", {**ENCODED, "architectures": [architecture]}, plugins={"fp8": {}})
    assert server_options(str(checkpoint), options)[0].get("runner") == runner


def test_an_encoded_attention_that_vllm_does_not_find_is_told(tmp_path):
    from arctic_plugins_vllm.quantization import ArcticConfig

    quantization = {
        **ENCODED["quantization_config"],
        "modules": {"bert.encoder.layer.*.attention.self.query": "fp8", "bert.encoder.layer.*.output.dense": "fp8"},
    }
    checkpoint = make(tmp_path / "model", {"model_type": "bert", "quantization_config": quantization})
    message = r"attention.self.query encoded, which vLLM does not support; .*\*\*.attention.self.\*"
    for use in (lambda: server_options(str(checkpoint)), lambda: ArcticConfig.from_config(quantization)):
        with pytest.raises(CheckpointError, match=message):
            use()
    del quantization["modules"]["bert.encoder.layer.*.attention.self.query"]
    server_options(str(make(tmp_path / "other", {"model_type": "bert", "quantization_config": quantization})))


def test_an_adapter_is_served_over_its_encoded_base(base, tmp_path):
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {}, "lora": {"r": 4}})
    values, _ = server_options(str(adapter), base=str(base))
    modules = [{"name": "adapter", "path": str(adapter)}]
    assert values == {
        **READ,
        "model": str(base),
        "enable_lora": True,
        "max_lora_rank": 8,
        "lora_modules": modules,
        "enforce_eager": True,
    }


def test_a_base_on_this_machine_is_shown_and_asked_for(base, tmp_path):
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {}, "lora": {"r": 4}})
    with pytest.raises(
        ConfigError,
        match=f"names {base}, a local directory, as its base; .*; arctic serve {adapter} --base {base}",
    ):
        server_options(str(adapter))
    inside = make(tmp_path / "inside", None, adapter_of=tmp_path / "inside" / "base", plugins={"lora": {"r": 4}})
    (inside / "base").mkdir()
    with pytest.raises(ConfigError, match="a local directory, as its base"):
        server_options(str(inside))


def test_an_adapter_over_a_plain_base_says_how_to_encode_it(base, tmp_path):
    plain = make(tmp_path / "plain", {})
    adapter = make(tmp_path / "adapter", None, adapter_of=plain, plugins={"fp8": {}, "lora": {"r": 4}})
    with pytest.raises(
        ConfigError, match=f"its base {plain} is plain; arctic quantize {plain} BASE --plugins fp8 && arctic serve BASE"
    ):
        server_options(str(adapter), base=str(plain))
    assert server_options(str(adapter), base=str(base))[0]["model"] == str(base)
    unencoded = make(tmp_path / "unencoded", None, adapter_of=plain, plugins={"lora": {"r": 4}})
    assert server_options(str(unencoded), base=str(plain))[0]["model"] == str(plain)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, CheckpointError, "has no config.json; expected a checkpoint directory"),
        (
            {"quantization_config": {**ENCODED["quantization_config"], "codecs": {"x": {"type": "fp3"}}}},
            PluginNotFoundError,
            "no installed plugin provides the checkpoint's codec type 'fp3'; install the plugin",
        ),
        (
            {"quantization_config": {**ENCODED["quantization_config"], "codecs": {"x": {"type": "fp8", "bits": 3}}}},
            CheckpointError,
            "is not valid",
        ),
        (
            {"quantization_config": {**ENCODED["quantization_config"], "format": 2}},
            CheckpointError,
            "has format 2; expected at most 1",
        ),
    ],
)
def test_what_cannot_be_served_is_said_before_the_server_starts(tmp_path, config, error, message):
    directory = tmp_path / "nothing" if config is None else make(tmp_path / "checkpoint", config)
    with pytest.raises(error, match=message):
        server_options(str(directory))


def test_a_base_that_is_encoded_otherwise_is_not_served_under_the_adapter(base, tmp_path):
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {"group_size": 64}, "lora": {"r": 4}})
    with pytest.raises(
        ConfigError,
        match="was trained over weights encoded with .*'group_size': 64.*, but .* was made with .*'group_size': "
        "'channel'",
    ):
        server_options(str(adapter), base=str(base))


def test_a_damaged_adapter_is_not_served(base, tmp_path):
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {}, "lora": {"r": 4}})
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json (has 1 bytes|is not valid JSON)"):
        server_options(str(adapter))


def test_base_is_for_adapters(base):
    with pytest.raises(ConfigError, match="--base is for adapters"):
        server_options(str(base), base=str(base))


def test_a_hub_id_goes_to_vllm_as_it_is():
    assert server_options("some/model")[0] == {**READ, "model": "some/model"}


def test_an_adapter_of_another_program_is_served_over_the_base_that_it_names(base, tmp_path):
    adapter = make(tmp_path / "adapter", None, adapter_of="some/model")
    values, _ = server_options(str(adapter))
    assert (values["model"], values["lora_modules"]) == ("some/model", [{"name": "adapter", "path": str(adapter)}])


def test_an_adapter_is_named_after_its_directory_wherever_one_stands(base, tmp_path, monkeypatch):
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {}, "lora": {"r": 4}})
    monkeypatch.chdir(adapter)
    assert server_options(".", base=str(base))[0]["lora_modules"] == [{"name": "adapter", "path": str(adapter)}]


@pytest.mark.parametrize("options", [["--model", "BASE"], ["--model=BASE"]])
def test_the_base_of_an_adapter_may_be_given_as_vllms_model(base, tmp_path, options):
    adapter = make(
        tmp_path / "adapter", None, adapter_of=make(tmp_path / "plain", {}), plugins={"fp8": {}, "lora": {"r": 4}}
    )
    server_options(str(adapter), [option.replace("BASE", str(base)) for option in options])
    with pytest.raises(ConfigError, match="names .*plain, a local directory"):
        server_options(str(adapter))


def test_the_checkpoint_comes_before_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--port", "8000", "checkpoint"])
    assert stopped.value.code == 2
    assert "found --port in place of CHECKPOINT" in capsys.readouterr().err


def test_an_address_in_use_is_told_before_any_file_is_read(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as stopped:
            main(["serve", "nowhere", "--host", "127.0.0.1", f"--port={port}"])
        assert stopped.value.code == 2
        message = f"the server cannot listen on 127.0.0.1, port {port}: Address already in use; set --port or --host to"
        assert message in capsys.readouterr().err
        for elsewhere in ("--uds=socket", "--config=server.yaml", "--headless"):
            serving.check_address([elsewhere, "--port", str(port)])
    serving.check_address(["--port", str(port)])


def test_an_address_in_use_that_only_vllm_finds_is_told_in_one_line(tmp_path):
    (tmp_path / "socket").touch()
    script = "import sys; from arctic_plugins_vllm import server; sys.argv[0] = 'server'; server.main()"
    arguments = [json.dumps({"model": "some/model"}), "--uds", str(tmp_path / "socket")]
    done = engines().run(["-c", script, *arguments], environment=small_engine(tmp_path), status=2)
    assert done.stderr.splitlines()[-1] == "arctic: Address already in use; set --port, --host or --uds to another"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [["--port=99999"], ["--host", "x" * 300], ["--host=8.8.8.8"]])
def test_an_address_that_is_none_of_this_machine_is_told(options):
    with pytest.raises(ConfigError, match="the server cannot listen on .*; set --port or --host to another"):
        serving.check_address(options)


def test_a_plain_model_is_encoded_on_the_fly(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    plain = tiny_llama(tmp_path / "plain")
    monkeypatch.setattr(serving, "_check_heads", lambda *_: None)
    values, _ = server_options(
        str(plain), plugins=Stack.from_dict({"fp8": {"include": ["**.mlp.*"], "group_size": 64}})
    )
    assert (values["model"], values["enforce_eager"]) == (str(plain), True)
    assert values["hf_overrides"]["quantization_config"] == {
        "quant_method": "arctic",
        "format": 1,
        "on_the_fly": True,
        "codecs": {"fp8": {"type": "fp8", "bits": 8, "group_size": 64, "scale": "max", "activations": "full"}},
        "modules": {f"model.layers.*.mlp.{leaf}_proj": "fp8" for leaf in ("gate", "up", "down")},
    }


def test_without_the_integration_that_knows_the_claims_it_is_named(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("arctic_plugins.host.hosts", dict)
    with pytest.raises(ConfigError, match=r"need arctic-plugins-huggingface \(no installed integration offers"):
        server_options(str(tiny_checkpoint), plugins=Stack.from_dict({"fp8": {}}))


def test_what_cannot_be_encoded_on_the_fly_is_told(base, tmp_path):
    plain, fp8 = tiny_llama(tmp_path / "plain"), Stack.from_dict({"fp8": {}})
    encoded = make(tmp_path / "encoded", ENCODED)
    save_file({}, encoded / "model.safetensors")
    with pytest.raises(ConfigError, match="is already quantized"):
        server_options(str(encoded), plugins=fp8)
    with pytest.raises(ConfigError, match="the plugins change nothing"):
        server_options(str(plain), plugins=Stack.from_dict({"lora": {}}))
    with pytest.raises(ConfigError, match="--plugins deepspeed does nothing in vLLM"):
        server_options(str(plain), plugins=Stack.from_dict({"deepspeed": {}}))
    with pytest.raises(ConfigError, match="--plugins and --hf-overrides both"):
        server_options(str(plain), ["--hf-overrides={}"], plugins=fp8)
    with pytest.raises(ConfigError, match="--plugins has 'fp8', which changes models, and .*adapter is an adapter"):
        server_options(str(make(tmp_path / "adapter", None, adapter_of=base, plugins={"lora": {}})), plugins=fp8)


class Tuned(Plugin):
    """A plugin that fills no slot and only configures vLLM; it refuses what it cannot serve."""

    name = "tuned"

    class config(PluginConfig):  # noqa: N801 - the attribute of Plugin
        seed: int = 3
        """A seed."""

    @hookimpl
    def vllm_engine_args(self):
        return {"seed": self.options.seed}

    @hookimpl
    def vllm_check(self, arguments, model_config):
        self.seen = arguments, model_config
        if arguments.get("pipeline_parallel_size") == "2":
            raise ConfigError("not with two")


def test_a_plugin_that_only_configures_vllm_serves_every_checkpoint(base, tmp_path, monkeypatch):
    tuned = Tuned.from_options({})
    stack, plain = Stack((tuned,)), tiny_llama(tmp_path / "plain")
    assert len(stack.of_model()) == 0
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {}, "lora": {}})
    for checkpoint, given, is_encoded in ((base, {}, True), (plain, {}, False), (adapter, {"base": str(base)}, True)):
        alone, _ = server_options(str(checkpoint), **given)
        values, _ = server_options(str(checkpoint), plugins=stack, **given)
        assert values == {**alone, "seed": 3}
        arguments, config = tuned.seen
        assert arguments == {key: value for key, value in values.items() if key != "enforce_eager"}
        assert ("quantization_config" in config) == is_encoded
    both, _ = server_options(str(plain), plugins=Stack.from_dict({"fp8": {}}).plus(stack))
    assert both["seed"] == 3
    assert both["hf_overrides"]["quantization_config"]["on_the_fly"]
    # What the user sets is what a plugin checks.
    server_options(str(base), ["--seed=5", "--no-async-scheduling", "-tp", "2", "--port", "80"], plugins=stack)
    assert tuned.seen[0]["seed"] == "5"
    assert tuned.seen[0]["no_async_scheduling"] is True
    with pytest.raises(ConfigError, match="not with two"):
        server_options(str(base), ["--pipeline_parallel_size", "2"], plugins=stack)


def test_a_recorded_plugin_gives_way_to_that_of_the_command_line(tmp_path):
    recorded = make(tmp_path / "model", ENCODED, plugins={"fp8": {}, "speculate": {"tokens": 2}})
    tokens = [
        server_options(str(recorded), plugins=plugins)[0]["speculative_config"]["num_speculative_tokens"]
        for plugins in (None, Stack.from_dict({"speculate": {"tokens": 5}}))
    ]
    assert tokens == [2, 5]


def test_ngrams_on_cpu_start_no_thread_for_each_core(base, monkeypatch):
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    environments = [
        server_options(str(base), plugins=Stack.from_dict({"speculate": {"method": method}}))[1]
        for method in ("ngram", "suffix")
    ]
    assert [environment.get("NUMBA_NUM_THREADS") for environment in environments] == ["1", None]


def test_the_arguments_of_a_script_are_those_of_the_server(base, tmp_path):
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {}, "lora": {}})
    options = {"speculate": {"tokens": 4}}
    values, _ = server_options(str(adapter), base=str(base), plugins=Stack.from_dict(options))
    arguments = engine_args(str(adapter), options, base=str(base), max_model_len=128)
    assert arguments == {**{key: value for key, value in values.items() if key != "lora_modules"}, "max_model_len": 128}
    assert "enforce_eager" in engine_args(str(base))
    assert engine_args(str(base), enforce_eager=False, dtype="float32")["enforce_eager"] is False
    with pytest.raises(ConfigError, match="--async-scheduling does not work"):
        engine_args(str(base), options, async_scheduling=True)


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"head_dim": 16}, True),
        ({"hidden_size": 64, "num_attention_heads": 4}, True),
        ({"text_config": {"head_dim": 48}}, True),
        ({"head_dim": 64, "hidden_size": 64, "num_attention_heads": 4}, False),
        ({"hidden_size": 64, "num_attention_heads": 0}, False),
        ({"head_dim": 72, "kv_lora_rank": 512}, False),  # latent attention has sizes of its own
        ({}, False),
    ],
)
def test_heads_that_vllms_attention_does_not_have_are_refused(tmp_path, config, refused):
    model = make(tmp_path / "model", config)
    if refused:
        with pytest.raises(
            CheckpointError, match=r"has heads of size (16|48); expected one of 32, 64, .* in vLLM on CPU"
        ):
            server_options(str(model))
    else:
        server_options(str(model))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
    ],
)
def test_an_adapter_that_vllm_would_die_of_is_told(base, tmp_path, field, value):
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {}, "lora": {"r": 4}})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    write_provenance(adapter, Stack.from_dict({"fp8": {}, "lora": {"r": 4}}).to_dict())
    with pytest.raises(
        CheckpointError,
        match=rf"has {field} .*; expected LoRA or rsLoRA, which vLLM supports; merge the adapter",
    ):
        server_options(str(adapter), base=str(base))


def test_the_largest_of_several_ranks_is_served(base, tmp_path):
    adapter = make(tmp_path / "adapter", None, adapter_of=base, plugins={"fp8": {}, "lora": {"r": 4}})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"q_proj": 20}}))
    write_provenance(adapter, Stack.from_dict({"fp8": {}, "lora": {"r": 4}}).to_dict())
    assert server_options(str(adapter), base=str(base))[0]["max_lora_rank"] == 32
