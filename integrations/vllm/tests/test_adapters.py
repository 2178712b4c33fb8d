"""Several adapters over one base: what is set for them, and which are refused, before the server starts and while it
runs.
"""

import asyncio
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from arctic_plugins_vllm import serving
from arctic_plugins_vllm.adapters import parse_adapters
from arctic_plugins_vllm.checks import add_lora, check_request, load_lora_adapter
from arctic_plugins_vllm.serving import READ, server_options
from safetensors.torch import save_file

from arctic_plugins import Stack
from arctic_plugins.cli import main
from arctic_plugins.errors import CheckpointError, ConfigError
from arctic_plugins.frozen import ModuleCodecs
from arctic_plugins.provenance import write_provenance

LAYERS, HIDDEN = 2, 64
CODEC = {"type": "fp8", "bits": 8}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Of a processor that multiplies bfloat16, whatever this one does."""
    monkeypatch.setattr(serving, "_runs_on_cpu", lambda: False)
    monkeypatch.setattr(serving, "is_native", lambda *_: True)


def make_base(directory, *, encoded, layers=LAYERS, hidden=HIDDEN):
    """Attention of a Llama with weights of zeros, as on disk."""
    directory.mkdir()
    codecs = ModuleCodecs.from_config(
        {"quant_method": "arctic", "format": 1, "codecs": {"fp8": CODEC}, "modules": {"**": "fp8"}}
    )
    tensors, config = {}, {"model_type": "llama", "hidden_size": hidden, "num_attention_heads": 1}
    for layer in range(layers):
        name = f"model.layers.{layer}.self_attn.q_proj"
        if encoded:
            for suffix, spec in codecs.codecs["fp8"].layout((hidden, hidden)).items():
                tensors[f"{name}.weight{suffix}"] = torch.zeros(spec.shape, dtype=spec.dtype)
        else:
            tensors[f"{name}.weight"] = torch.zeros(hidden, hidden)
    if encoded:
        config["quantization_config"] = {**codecs.to_config(), "modules": {"model.layers.*.self_attn.q_proj": "fp8"}}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    if encoded:
        write_provenance(directory, Stack.from_dict({"fp8": {}}).to_dict())
    return directory


def make_adapter(directory, base, *, plugins=None, r=4, layers=LAYERS, hidden=HIDDEN, rows=None, template=None):
    directory.mkdir()
    (directory / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "r": r, "lora_alpha": 8})
    )
    names = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in range(layers)]
    save_file(
        {f"{name}.lora_A.weight": torch.zeros(r, hidden) for name in names}
        | {f"{name}.lora_B.weight": torch.zeros(rows or hidden, r) for name in names},
        directory / "adapter_model.safetensors",
    )
    if template is not None:
        (directory / "tokenizer_config.json").write_text("{}")
        (directory / "chat_template.jinja").write_text(template)
    if plugins is not None:
        write_provenance(directory, Stack.from_dict(plugins).to_dict())
    return directory


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base", encoded=True)


def test_several_adapters_over_one_base(base, tmp_path):
    """Of different ranks, one of another program: everything that vLLM needs for all of them."""
    one = make_adapter(tmp_path / "one", base, plugins={"fp8": {}, "lora": {"r": 4}})
    other = make_adapter(tmp_path / "other", base, r=20)
    values, _ = server_options(str(base), adapters={"sql": str(one), "chat": str(other)})
    write_provenance(other, {"fp8": {}})  # the same, of a script that uses PEFT over encoded weights
    assert server_options(str(base), adapters={"sql": str(one), "chat": str(other)})[0] == values
    modules = [{"name": "sql", "path": str(one)}, {"name": "chat", "path": str(other)}]
    lora = {"enable_lora": True, "max_lora_rank": 32, "max_loras": 2, "lora_modules": modules}
    assert values == {**READ, "model": str(base), **lora}
    # An adapter as CHECKPOINT, and one more.
    values, _ = server_options(str(one), base=str(base), adapters={"chat": str(other)})
    assert values == {**READ, "model": str(base), **lora, "lora_modules": [{**modules[0], "name": "one"}, modules[1]]}
    # Over a base that is encoded while it is loaded.
    plain = make_base(tmp_path / "plain", encoded=False)
    serving_fp8 = Stack.from_dict({"fp8": {}})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(serving, "on_the_fly", lambda *_, **__: {"quantization_config": {}})
        values, _ = server_options(str(plain), plugins=serving_fp8, adapters={"sql": str(one)})
    assert (values["max_lora_rank"], "max_loras" in values) == (8, False)


def test_adapters_that_agree_bring_their_tokenizer(base, tmp_path, caplog):
    paths = {
        name: str(make_adapter(tmp_path / name, base, template=template))
        for name, template in (("one", "A"), ("two", "A"), ("three", "B"))
    }
    agreed, _ = server_options(str(base), adapters={name: paths[name] for name in ("one", "two")})
    assert agreed["tokenizer"] == paths["one"]
    assert not caplog.messages
    values, _ = server_options(str(base), adapters=paths)
    assert "tokenizer" not in values
    assert "one, two, three have different tokenizers or chat templates: that of the base model" in caplog.messages[0]


def test_adapters_of_another_encoding_or_base_are_refused_with_the_command_that_mends_it(base, tmp_path):
    plain = make_base(tmp_path / "plain", encoded=False)
    grouped = make_adapter(tmp_path / "grouped", plain, plugins={"fp8": {"group_size": 64}, "lora": {"r": 4}})
    command = (
        f'arctic quantize {plain} BASE --plugins \'{{"fp8": {{"group_size": 64}}}}\' && '
        f"arctic serve BASE --lora x={grouped}, or arctic merge {grouped} OUT"
    )
    with pytest.raises(ConfigError) as refused:
        server_options(str(base), adapters={"x": str(grouped)})
    assert "'group_size': 64" in refused.value.found
    assert refused.value.fix == command
    with pytest.raises(ConfigError, match="its base .*plain is plain") as refused:
        server_options(str(plain), adapters={"x": str(grouped)})
    assert refused.value.fix == command
    # Trained over a base that is still there: that one.
    own = make_adapter(tmp_path / "own", base, plugins={"fp8": {}, "lora": {"r": 4}})
    with pytest.raises(ConfigError, match="is plain") as refused:
        server_options(str(plain), adapters={"x": str(own)})
    assert refused.value.fix == f"arctic serve {base} --lora x={own}, or arctic merge {own} OUT"


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize(
    ("shape", "has"),
    [
        ({"layers": 3}, "has no such module"),
        ({"hidden": 32}, r"has (one whose weight is )?\(64, (1, )?64\)"),
    ],
)
def test_an_adapter_of_a_model_of_other_shapes_is_refused(tmp_path, encoded, shape, has):
    """vLLM would load the part that fits, and answer with it."""
    base = make_base(tmp_path / "base", encoded=encoded)
    other = make_adapter(tmp_path / "other", "some/model", **shape)
    message = f"adapts model.layers.[02].self_attn.q_proj of shape .*, but {base} {has}.*; expected the base model of"
    with pytest.raises(ConfigError, match=message) as refused:
        server_options(str(base), adapters={"x": str(other)})
    assert refused.value.fix == f"arctic serve some/model --lora x={other}"


def test_an_adapter_of_plain_weights_over_encoded_ones_is_told(base, tmp_path, caplog):
    adapter = make_adapter(tmp_path / "one", base, plugins={"lora": {"r": 4}})
    server_options(str(base), adapters={"x": str(adapter)})
    assert [message.partition(":")[0] for message in caplog.messages] == [
        f"adapter 'x' was trained over plain weights, and {base} is encoded"
    ]


def test_names_of_models_differ(base, tmp_path):
    adapter = str(make_adapter(tmp_path / "one", base))
    assert parse_adapters(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    for wrong in ("a", "=b", "a="):
        with pytest.raises(ConfigError, match=f"--lora is '{wrong}'; expected NAME=PATH"):
            parse_adapters([wrong])
    with pytest.raises(ConfigError, match="two adapters 'a'"):
        parse_adapters(["a=b", "a=c"])
    for options, name in ([], str(base)), (["--served-model-name", "it"], "it"):
        with pytest.raises(ConfigError, match="two models would be called"):
            server_options(str(base), options, adapters={name: adapter})
    with pytest.raises(ConfigError, match="--lora and vLLM's --lora-modules both"):
        server_options(str(base), ["--lora-modules", "a=b"], adapters={"x": adapter})


def test_what_is_no_adapter_is_told_by_the_command(base, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", str(base), "--lora", f"x={base}"])
    assert stopped.value.code == 2
    assert f"arctic: {base} has no adapter_config.json; expected the directory of an adapter" in capsys.readouterr().err
    adapter = make_adapter(tmp_path / "one", base)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no adapter_model.safetensors"):
        server_options(str(base), adapters={"x": str(adapter)})


def running(base, *, rank=16, overrides=None, encoded_while_loading=False):
    """The part of vLLM's config of a running engine that is read."""
    config = json.loads((base / "config.json").read_text())
    if encoded_while_loading:
        config["quantization_config"] = {"quant_method": "arctic", "on_the_fly": True}
    model = SimpleNamespace(
        model=str(base), hf_config=SimpleNamespace(to_dict=lambda: dict(config)), hf_overrides=overrides or {}
    )
    return SimpleNamespace(model_config=model, lora_config=SimpleNamespace(max_lora_rank=rank), additional_config={})


def test_an_adapter_is_checked_when_it_is_loaded_at_run_time(base, tmp_path):
    fitting = make_adapter(tmp_path / "fitting", base, plugins={"fp8": {}, "lora": {"r": 4}})
    check_request(running(base), "x", str(fitting))
    check_request(running(base), "x", "some/adapter")  # vLLM downloads it, or answers that there is none
    plain = make_base(tmp_path / "plain", encoded=False)
    engine = running(plain, encoded_while_loading=True)  # by hand, with `hf_overrides`: nobody knows how
    check_request(engine, "x", str(fitting))
    engine.additional_config["arctic_plugins"] = Stack.from_dict({"fp8": {}}).to_dict()
    check_request(engine, "x", str(fitting))
    engine.additional_config["arctic_plugins"] = Stack.from_dict({"fp8": {"group_size": 64}}).to_dict()
    with pytest.raises(ConfigError, match="was trained over weights encoded with"):
        check_request(engine, "x", str(fitting))
    with pytest.raises(ConfigError, match="trained over encoded weights, but its base .* is plain; arctic serve"):
        check_request(running(plain), "x", str(fitting))
    with pytest.raises(ConfigError, match=f"needs rank 32, and .* ranks up to 16; start it with '--lora x={tmp_path}"):
        check_request(running(base), "x", str(make_adapter(tmp_path / "wide", base, r=20)))
    (fitting / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors has 0 bytes"):
        check_request(running(base), "x", str(fitting))


def test_an_adapter_with_another_scaling_than_the_server_is_refused_at_run_time(tiny_checkpoint, tmp_path):
    scaling = {"type": "yarn", "factor": 4.0}
    plugins = {"rope": scaling, "lora": {"r": 4}}
    adapter = make_adapter(tmp_path / "long", tiny_checkpoint, plugins=plugins, rows=128)
    values, _ = server_options(str(tiny_checkpoint), adapters={"x": str(adapter)})
    check_request(running(tiny_checkpoint, overrides=values["hf_overrides"]), "x", str(adapter))
    with pytest.raises(ConfigError, match="changes '.*' of its base to .*, which the server was started without"):
        check_request(running(tiny_checkpoint), "x", str(adapter))
    short = make_adapter(tmp_path / "short", tiny_checkpoint, plugins={"lora": {"r": 4}}, rows=128)
    with pytest.raises(ConfigError, match="'x' and 'y' change the config of their base in different ways"):
        server_options(str(tiny_checkpoint), adapters={"x": str(adapter), "y": str(short)})


def test_a_refused_adapter_is_the_fault_of_the_request(base, tmp_path):
    """The answer of the endpoint; errors of vLLM itself keep their status."""
    pytest.importorskip("vllm")
    other, fits = make_adapter(tmp_path / "other", base, layers=3), make_adapter(tmp_path / "fits", base)

    async def load(path, engine_says=None):
        async def add(engine, request):
            if engine_says:
                raise engine_says
            return True

        async def stock(models, request):
            try:
                await add_lora(add, SimpleNamespace(vllm_config=running(base)), request)
            except Exception as error:
                return f"500: {error}"
            return "Success"

        return await load_lora_adapter(stock, None, SimpleNamespace(lora_name="x", lora_path=str(path)))

    refused = asyncio.run(load(other)).error
    assert (refused.code, refused.type) == (400, "BadRequestError")
    assert "has no such module; expected the base model of its training" in refused.message
    assert asyncio.run(load(fits)) == "Success"
    assert asyncio.run(load(fits, RuntimeError("out of memory"))) == "500: out of memory"
    shutil.rmtree(fits)
    assert asyncio.run(load(fits)) == "Success"  # of the stock function: vLLM answers for a path that is not here
