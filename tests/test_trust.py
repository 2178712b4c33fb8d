"""Files from strangers: what a checkpoint or an adapter says never becomes code, an option, a path outside or an
endless loop.
"""

import json
import os
import shutil
import signal
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import yaml
from arctic_plugins_huggingface import load_model, save_checkpoint
from arctic_plugins_huggingface.checkpoints.export import export_checkpoint
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_huggingface.checkpoints.merge import merge_adapter
from arctic_plugins_huggingface.files.check import check_checkpoint
from arctic_plugins_huggingface.loading.config import load_config
from arctic_plugins_huggingface.training.check import check_recipe
from arctic_plugins_huggingface.training.recipe import Recipe
from arctic_plugins_huggingface.training.run import train
from arctic_plugins_vllm.serving import server_command, server_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from arctic_plugins import Stack, stack_from_checkpoint
from arctic_plugins.adapter import read_adapter, read_any_adapter
from arctic_plugins.cache import cache_directory
from arctic_plugins.claims import matches
from arctic_plugins.cli import main
from arctic_plugins.errors import ArcticError, CheckpointError, ConfigError, PluginNotFoundError, UserError
from arctic_plugins.frozen import ModuleCodecs
from arctic_plugins.provenance import FILE_NAME, check_files, write_provenance
from arctic_plugins.recorded import recorded_stack
from arctic_plugins.stack import read_yaml
from arctic_plugins.testing import draw_adapter, tiny_llama, watched

ADAPTER = "adapter_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A plain model, an encoded one, and an adapter over encoded weights that were offloaded while it was trained."""
    directory = tmp_path_factory.mktemp("made")
    plain, fp8 = tiny_llama(directory / "plain"), Stack.from_dict({"fp8": {"group_size": 64}})
    save_checkpoint(*load_model(plain, fp8), directory / "encoded", fp8)
    stack = Stack.from_dict(
        {"fp8": {"group_size": 64}, "lora": {"r": 4}, "offload": {"to": "disk", "path": str(directory / "disk")}}
    )
    model, tokenizer = load_model(plain, stack)
    draw_adapter(model)
    save_checkpoint(model, tokenizer, directory / "adapter", stack)
    return directory


@pytest.fixture
def here(made, tmp_path):
    """A copy to tamper with."""
    shutil.copytree(made, tmp_path / "here", ignore=shutil.ignore_patterns("disk"))
    change(tmp_path / "here" / "adapter", ADAPTER, base_model_name_or_path=str(tmp_path / "here" / "plain"))
    return tmp_path / "here"


def change(checkpoint, name, **values):
    """Set keys of a JSON file, as somebody does who also corrects its digest."""
    path = checkpoint / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    record = json.loads((checkpoint / FILE_NAME).read_text())
    record["files"].pop(name, None)
    (checkpoint / FILE_NAME).write_text(json.dumps(record))


@contextmanager
def soon(seconds=20):
    """TimeoutError if the block takes longer, wherever it hangs."""

    def ring(*_):
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


EVIL = ["x", "--tool-parser-plugin=evil.py", "--tool-call-parser=hermes", "--enable-auto-tool-choice"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target_modules", EVIL, r"target_modules\.1 is '--tool-parser-plugin=evil\.py'; expected String should match"),
        ("target_modules", {"q_proj": 1}, "target_modules"),
        ("target_parameters", ["../x"], "target_parameters"),
        ("modules_to_save", ["--x"], "modules_to_save"),
        ("rank_pattern", {"(a+)+$": 4}, "rank_pattern"),
        ("rank_pattern", {"q_proj": 0}, "rank_pattern.q_proj is 0; expected .*greater than or equal to 1"),
        ("alpha_pattern", {"q_proj": "nan"}, "alpha_pattern"),
        ("r", -5, "r is -5; expected greater than or equal to 1"),
        ("r", 0, "r is 0"),
        ("r", "4", "r is '4'; expected a valid integer"),
        ("r", True, "r is True"),
        ("r", 10**30, "r is 1000"),
        ("lora_alpha", "x", "lora_alpha is 'x'"),
        ("base_model_name_or_path", ["a"], r"base_model_name_or_path is \['a'\]"),
        ("base_model_name_or_path", "--trust-remote-code", "base_model_name_or_path is '--trust-remote-code'"),
        ("base_model_name_or_path", "a\x00b", "base_model_name_or_path"),
        ("base_model_name_or_path", 7, "base_model_name_or_path"),
        ("peft_type", "XLORA", "peft_type is 'XLORA'; expected '?LORA"),
        ("layer_replication", [[0, 10**9]], "layer_replication"),
        ("megatron_config", {"x": 1}, "megatron_config"),  # with it PEFT imports the module that `megatron_core` names
    ],
)
def test_a_field_of_an_adapter_is_what_it_should_be(here, field, value, message):
    change(here / "adapter", ADAPTER, **{field: value})
    with watched(here) as done, soon():
        for use in (
            read_adapter,
            load_checkpoint,
            lambda path: merge_adapter(path, here / "merged"),
            lambda path: server_options(str(path)),
        ):
            with pytest.raises(CheckpointError, match=message):
                use(here / "adapter")
    assert done == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "(.*a+.*)+X$"}, r"expected names in target_modules, not '\(\.\*a"),
        ({"feedforward_modules": ["(a+)+$"]}, "expected names in feedforward_modules"),
        ({"rank_pattern": {"(a+)+$": 4}}, "expected names in rank_pattern"),
        ({"r": 10**9}, "expected sizes of at most 65,536 in r"),
        ({"init_weights": float("nan")}, "adapter_config.json"),
        ({"rank_pattern": json.loads("[" * 500 + "]" * 500)}, "to a depth of 10 in rank_pattern"),
    ],
)
def test_a_field_of_another_tuners_adapter_is_what_it_should_be(here, fields, message):
    change(here / "adapter", ADAPTER, peft_type="OFT", **fields)
    with watched(here) as done, soon():
        for use in (read_any_adapter, load_checkpoint, lambda path: merge_adapter(path, here / "merged")):
            with pytest.raises(CheckpointError, match=message):
                use(here / "adapter")
    assert done == []


def test_no_expression_of_an_adapter_is_evaluated(here):
    """PEFT and others save one where the recipe had one: what it found stands in the file of weights."""
    ids = torch.arange(5, 17)[None]
    expected = load_checkpoint(here / "adapter")[0](ids).logits
    merge_adapter(here / "adapter", here / "merged")
    change(here / "adapter", ADAPTER, target_modules="(.*a+.*)+X$", exclude_modules="(.*a+.*)+X$")
    with soon(60):
        assert torch.equal(load_checkpoint(here / "adapter")[0](ids).logits, expected)
        merge_adapter(here / "adapter", here / "again")
        server_options(str(here / "adapter"), base=str(here / "encoded"))
    assert (here / "again" / "model.safetensors").read_bytes() == (here / "merged" / "model.safetensors").read_bytes()


def test_a_pickled_adapter_is_not_served(here):
    torch.save({}, here / "adapter" / "adapter_model.bin")
    (here / "adapter" / "adapter_model.safetensors").unlink()
    change(here / "adapter", FILE_NAME, files={})
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        server_options(str(here / "adapter"), base=str(here / "encoded"))


def test_no_message_leads_to_a_distribution_of_a_file(here):
    change(
        here / "encoded", FILE_NAME, stack={"evil": {}, "fp8": {}}, plugins={"evil": "evil --index-url https://evil"}
    )
    with pytest.raises(PluginNotFoundError) as told:
        check_checkpoint(here / "encoded")
    assert (
        "it is provided by 'evil --index-url https://evil', which runs as code: install it only if you know it and "
        "trust it" in str(told.value)
    )
    assert "pip install" not in str(told.value)


def test_links_that_lead_out_are_not_copied(here, tmp_path):
    (tmp_path / "id_rsa").write_text("secret")
    (here / "plain" / "notes.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link to .*id_rsa; expected a file of the checkpoint"):
        merge_adapter(here / "adapter", here / "merged")
    assert not (here / "merged").exists()
    (here / "plain" / "notes.txt").unlink()
    (here / "plain" / "notes.txt").symlink_to("config.json")
    merge_adapter(here / "adapter", here / "merged")
    assert (here / "merged" / "notes.txt").read_bytes() == (here / "plain" / "config.json").read_bytes()


def test_an_adapter_does_not_choose_where_weights_are_written(here, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    stack = json.loads((here / "adapter" / FILE_NAME).read_text())["stack"]
    stack["offload"]["path"] = str(elsewhere)
    change(here / "adapter", FILE_NAME, stack=stack)
    load_checkpoint(here / "plain")  # imports what the block uses
    with watched(here) as done:
        model, _ = load_checkpoint(here / "adapter")
    assert done == []
    assert not elsewhere.exists()
    assert not any(handle.placement for module in model.modules() for handle in getattr(module, "frozen", {}).values())
    with watched(here, here / "merged", here / "merged.unfinished") as done:
        merge_adapter(here / "adapter", here / "merged")
    assert done == []
    assert not elsewhere.exists()
    # What the user says goes.
    offloaded, _ = load_checkpoint(
        here / "adapter", Stack.from_dict({"offload": {"to": "disk", "path": str(elsewhere)}})
    )
    assert elsewhere.is_dir()
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        assert torch.equal(offloaded(ids).logits, model(ids).logits)


def test_what_is_about_the_machine_stays_there(tmp_path):
    written = {
        "fp8": {"bits": 6},
        "lora": {"r": 2},
        "offload": {"to": "disk", "path": "/nowhere"},
        "longseq": {"sequence_parallel": 4, "tiled_mlp": True},
        "moe": {"expert_parallel": 8, "capacity_factor": 1.5},
    }
    write_provenance(tmp_path, Stack.from_dict(written).to_dict())
    found = stack_from_checkpoint(tmp_path).to_dict()
    assert found.keys() == {"fp8", "lora", "longseq", "moe"}
    assert (found["fp8"]["bits"], found["lora"]["r"]) == (6, 2)
    assert (found["longseq"]["sequence_parallel"], found["longseq"]["tiled_mlp"]) == (1, True)
    assert (found["moe"]["expert_parallel"], found["moe"]["capacity_factor"]) == (1, 1.5)
    recorded = recorded_stack(tmp_path).to_dict()
    assert (recorded["offload"]["path"], recorded["moe"]["expert_parallel"]) == ("/nowhere", 8)


def test_an_adapter_brings_no_base_of_its_own_unasked(here):
    shutil.copytree(here / "plain", here / "adapter" / "base")
    change(here / "adapter", ADAPTER, base_model_name_or_path=str(here / "adapter" / "base"))
    for use in (load_checkpoint, lambda path: merge_adapter(path, here / "merged")):
        with pytest.raises(
            CheckpointError, match="contains its own base model, .*base; expected a model that you chose; pass --base"
        ):
            use(here / "adapter")
    load_checkpoint(here / "adapter", base=here / "plain")
    assert (merge_adapter(here / "adapter", here / "merged", base=here / "plain") / "config.json").is_file()


@pytest.mark.parametrize(
    "pattern", ["**" * 14 + "X", "*a" * 400 + "X", "**a" * 300 + "X", "**" + "*a" * 400 + "X", "**a*b" * 100 + "*X"]
)
def test_no_pattern_takes_long(pattern):
    codecs = {"quant_method": "arctic", "format": 1, "codecs": {"fp8": {"type": "fp8"}}, "modules": {pattern: "fp8"}}
    found = ModuleCodecs.from_config(codecs) if len(pattern) <= 1000 else None
    started = time.process_time()
    for name in ("model.layers.0.self_attn.q_proj", "a" * 300, "a." * 150, "ab" * 150):
        assert found is None or found.codec_of(name) is None
        assert not matches(pattern, name)
    assert time.process_time() - started < 10  # one of them took more than 20 s for the first name; now 0.02 s for all


def test_patterns_have_bounds():
    codecs = {"quant_method": "arctic", "format": 1, "codecs": {"fp8": {"type": "fp8"}}}
    with pytest.raises(
        CheckpointError, match=r"1 patterns of up to 1001 characters, 1001 in total; expected at most 10000 of 1000"
    ):
        ModuleCodecs.from_config({**codecs, "modules": {"*" * 1001: "fp8"}})
    with pytest.raises(CheckpointError, match="10001 patterns"):
        ModuleCodecs.from_config({**codecs, "modules": {f"*{index}": "fp8" for index in range(10_001)}})
    with pytest.raises(CheckpointError, match="200400 in total"):
        ModuleCodecs.from_config({**codecs, "modules": {f"*{index:0>667}": "fp8" for index in range(300)}})
    many = ModuleCodecs.from_config({**codecs, "modules": {f"model.{index}": "fp8" for index in range(20_000)}})
    assert many.codec_of("model.19999") is not None


def regular_expression(pattern):
    """What :func:`matches` means, as one set of states after the other: an independent reference."""
    tokens = []
    while pattern:
        step = 2 if pattern.startswith("**") else 1
        tokens.append(pattern[:step])
        pattern = pattern[step:]

    def closed(states):
        states = set(states)
        for state in range(len(tokens)):
            if state in states and tokens[state] in ("*", "**"):
                states.add(state + 1)
        return states

    def match(name):
        states = closed({0})
        for letter in name:
            after = set()
            for state in states - {len(tokens)}:
                if tokens[state] == "**" or (tokens[state] == "*" and letter != "."):
                    after.add(state)
                elif tokens[state] == letter:
                    after.add(state + 1)
            states = closed(after)
        return len(tokens) in states

    return match


@given(st.text("ab.*", max_size=12), st.text("ab.", max_size=14))
@settings(max_examples=500, deadline=None)
def test_patterns_mean_what_they_meant(pattern, name):
    assert matches(pattern, name) == regular_expression(pattern)(name)


@pytest.mark.parametrize("name", ["/etc/passwd", "../plain/config.json", "a/../../plain/config.json", "", "a\x00b"])
def test_a_checkpoint_names_files_of_its_own(here, name):
    change(here / "encoded", FILE_NAME, files={name: {"bytes": 1, "xxh3_128": "0"}})
    with pytest.raises(CheckpointError, match=r"arctic_plugins\.json names .*; expected a file in its own directory"):
        check_files(here / "encoded")
    (here / "plain" / "model.safetensors").rename(here / "plain" / "part.safetensors")
    (here / "plain" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}})
    )
    with pytest.raises(CheckpointError, match=r"index\.json names .*; expected a file in its own directory"):
        check_checkpoint(here / "plain")


def test_only_regular_files_are_read(here):
    os.mkfifo(here / "encoded" / "pipe")
    for name in ("zero", "pipe"):
        if name == "zero":
            (here / "encoded" / name).symlink_to("/dev/zero")
        change(here / "encoded", FILE_NAME, files={name: {"bytes": 0, "xxh3_128": "0"}})
        with soon(), pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
            check_files(here / "encoded")
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "additional_chat_templates/a.jinja",
    ):
        copy = here / name.replace("/", "-")
        shutil.copytree(here / "plain", copy)
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).unlink(missing_ok=True)
        os.mkfifo(copy / name)
        for use in (load_model, lambda path: server_options(str(path))):
            with soon(), pytest.raises(CheckpointError, match=f"{name} is not a regular file|has no config.json"):
                use(copy)


def test_links_of_the_hubs_cache_are_followed(here, tmp_path):
    """``snapshots/REVISION/FILE`` is a link to ``blobs/DIGEST``."""
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted((here / "plain").iterdir())):
        shutil.copy(path, blobs / str(index))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(index))
    load_model(snapshot)
    assert (merge_adapter(here / "adapter", here / "merged", base=snapshot) / "config.json").is_file()


def test_an_index_of_many_files_is_read_once(here):
    (here / "plain" / "model.safetensors").unlink()
    names = {f"w{index}": f"part-{index}.safetensors" for index in range(50_000)}
    (here / "plain" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with soon(), pytest.raises(CheckpointError, match="which is missing"):
        check_checkpoint(here / "plain")


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 10**8), ("num_hidden_layers", 1e30), ("num_local_experts", 10**9)]
)
def test_a_config_speaks_of_what_the_files_hold(here, key, value):
    change(here / "encoded", "config.json", **{key: value})
    for use in (
        load_model,
        lambda path: server_options(str(path)),
        lambda path: export_checkpoint(path, here / "out", "deepspeedfp"),
    ):
        with soon(), pytest.raises(CheckpointError, match=f"has {key} .*; expected at most what its files contain"):
            use(here / "encoded")


@pytest.mark.parametrize(
    "keys",
    [{"vocab_size": 10**9, "tie_word_embeddings": False}, {"num_hidden_layers": 1000, "intermediate_size": 10**7}],
)
def test_no_memory_is_taken_for_what_files_lack(here, keys):
    change_plain(here, **keys)
    with (
        soon(60),
        pytest.raises(CheckpointError, match="describes a model of .* elements, but its files have .* bytes"),
    ):
        load_model(here / "plain")


def test_a_config_of_the_hub_has_bounds(here, tmp_path, monkeypatch):
    """Its files are not here yet."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    change_plain(here, num_hidden_layers=10**8)
    shutil.copy(here / "plain" / "config.json", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    with soon(), pytest.raises(CheckpointError, match="has num_hidden_layers 100000000"):
        load_config("some/model", cache_dir=tmp_path / "hub", local_files_only=True)


@pytest.mark.parametrize("name", ["\ud800", "a" * 300, "a/" * 3000])
def test_odd_names_are_told_in_a_line(here, name):
    change(here / "encoded", FILE_NAME, files={name: {"bytes": 1, "xxh3_128": "0"}})
    with pytest.raises(CheckpointError, match=r"expected a file in its own directory|is not valid JSON"):
        check_files(here / "encoded")
    change(here / "adapter", ADAPTER, base_model_name_or_path=name)
    for use in (
        load_checkpoint,
        lambda path: merge_adapter(path, here / "merged"),
        lambda path: server_options(str(path)),
    ):
        with pytest.raises(ArcticError):
            use(here / "adapter")


def test_options_that_no_command_line_takes_are_refused(here):
    with pytest.raises(
        ConfigError,
        match="vLLM's options take .* characters, most of them for 'lora_target_modules'; expected at most 100000",
    ):
        server_command({"model": "x", "lora_target_modules": ["a" * 50] * 3000}, [])


@pytest.mark.parametrize(
    "keys",
    [
        {"attn_implementation": "kernels-community/flash-attn2@0:run"},
        {"_attn_implementation": "somebody/kernel"},
        {"text_config": {"experts_implementation": "somebody/kernel"}},
        {"transformers_weights": "pytorch_model.bin"},
        {"speculators_config": {"verifier": {"name_or_path": "/elsewhere"}}},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_a_config_names_nothing_else_to_load(here, keys):
    change(here / "encoded", "config.json", **keys)
    for use in (load_model, lambda path: server_options(str(path))):
        with (
            watched(here) as done,
            pytest.raises(CheckpointError, match="expected a model in this directory alone; remove"),
        ):
            use(here / "encoded")
        assert done == []


def test_a_model_does_not_bring_an_adapter(here):
    shutil.copy(here / "adapter" / ADAPTER, here / "plain")
    with pytest.raises(CheckpointError, match="holds a model and an adapter"):
        load_model(here / "plain")


def test_a_rank_is_that_of_the_tensors(here):
    change(here / "adapter", ADAPTER, r=65_536)
    with pytest.raises(CheckpointError, match="has r 65536; expected the rank of its tensors, 4"):
        load_checkpoint(here / "adapter")


@pytest.mark.parametrize(
    "keys", [{"tokenizer_class": "AutoModelForCausalLM"}, {"sp_model_kwargs": {"model_file": "/dev/zero"}}]
)
def test_a_tokenizer_is_one_and_names_no_files(here, keys):
    change(here / "encoded", "tokenizer_config.json", **keys)
    with (
        watched(here) as done,
        soon(),
        pytest.raises(CheckpointError, match="tokenizer_config.json has (tokenizer_class|sp_model_kwargs)"),
    ):
        load_model(here / "encoded")
    assert done == []


def test_how_an_adapter_was_drawn_is_not_done_again(here):
    expected = load_checkpoint(here / "adapter")[0](torch.arange(5, 17)[None]).logits
    change(here / "adapter", ADAPTER, init_lora_weights="gaussian")
    assert torch.equal(load_checkpoint(here / "adapter")[0](torch.arange(5, 17)[None]).logits, expected)
    change(here / "adapter", ADAPTER, init_lora_weights="pissa_niter_1000000000")
    for use in (
        load_checkpoint,
        lambda path: merge_adapter(path, here / "merged"),
        lambda path: server_options(str(path)),
    ):
        with (
            soon(),
            pytest.raises(
                CheckpointError,
                match=r"init_lora_weights is 'pissa_niter_1000000000'; .*does not fit the original base model",
            ),
        ):
            use(here / "adapter")


def test_names_of_files_do_not_say_how_many_processes_there_are(here):
    (here / "encoded" / "model-rank-20000-part-0.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has files of the processes \[20000\]"):
        server_options(str(here / "encoded"))


@pytest.mark.parametrize("name", ["s3://bucket", "evil/..", "~/x", "evil/x:Q4_K_M", "-x/y"])
def test_only_a_hub_id_is_one(name):
    with pytest.raises(ArcticError):
        server_options(name)


def test_a_stack_has_bounds(here):
    stack = {"fp8": {"exclude": [f"*{index}" for index in range(20_000)]}}
    change(here / "adapter", FILE_NAME, stack=stack)
    with soon(), pytest.raises(CheckpointError, match="the stack of .* has .* characters; expected at most 100000"):
        load_checkpoint(here / "adapter")


def test_no_file_of_the_working_directory_stands_for_a_module(here, monkeypatch):
    """``cd downloaded && arctic serve .``"""
    from click.testing import CliRunner

    from arctic_plugins.cli import arctic

    started = []
    monkeypatch.setattr("os.execve", lambda program, command, environment: started.append((command, environment)))
    monkeypatch.chdir(here / "encoded")
    assert CliRunner().invoke(arctic, ["serve", "."]).exit_code == 0
    [(command, environment)] = started
    assert command[1:4] == ["-P", "-m", "arctic_plugins_vllm.server"]
    assert environment["PYTHONSAFEPATH"] == "1"  # for the processes that vLLM starts


def test_code_of_a_checkpoint_is_neither_executed_nor_asked_for(here, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (here / "plain" / "evil.py").write_text(f"open({str(here / 'executed')!r}, 'w')\nclass C: pass\n")
    change_plain(here, model_type="evil", auto_map=dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.C"))
    load = (load_model, lambda path: merge_adapter(here / "adapter", here / "merged", base=path))
    for use in load:
        with (
            watched(here) as done,
            pytest.raises(CheckpointError, match="its own code, which is not executed; .*trust_remote_code: true"),
        ):
            use(here / "plain")
        assert done == []
    own = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}
    change(here / "encoded", "tokenizer_config.json", **own)
    shutil.copy(here / "plain" / "evil.py", here / "encoded")
    with watched(here) as done:
        try:
            load_model(here / "encoded")
        except CheckpointError as error:
            assert "trust_remote_code" in str(error)
    assert done == []
    assert not (here / "executed").exists()


@pytest.fixture
def own_code(here, monkeypatch):
    """A checkpoint whose model and config are its own code."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here / "modules"))
    (here / "plain" / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (here / "plain" / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    change_plain(here, model_type="own", architectures=["OwnForCausalLM"], auto_map=auto_map)
    return here / "plain"


def test_code_of_a_checkpoint_is_executed_by_whoever_says_so_each_time(here, own_code, capsys):
    """Every command that reads the model has the option, and none of them records it."""
    stack = Stack.from_dict({"fp8": {}, "lora": {"r": 4}})
    adapter = save_checkpoint(*load_model(own_code, stack, trust_remote_code=True), here / "own-adapter", stack)
    rows = here / "rows.jsonl"
    rows.write_text('{"text": "a b c"}\n' * 4)
    training = {"output_dir": str(here / "out"), "max_steps": 1, "bf16": False}
    recipe = {
        "model": str(own_code),
        "plugins": {"fp8": {}, "lora": {"r": 4}},
        "data": {"path": str(rows), "format": "text"},
        "training": training,
    }
    train(Recipe.model_validate({**recipe, "load": {"trust_remote_code": True}}))
    commands = [
        ["quantize", str(own_code), str(here / "encoded-own")],
        ["merge", str(adapter), str(here / "merged-own")],
        ["merge", str(here / "out" / "final"), str(here / "merged-trained")],
        ["export", str(here / "encoded-own"), str(here / "exported-own"), "--format", "compressed-tensors"],
        ["generate", str(here / "merged-own"), "x", "--max-new-tokens", "1"],
        ["generate", str(adapter), "x", "--max-new-tokens", "1"],
    ]
    for command in commands:
        for options, status in (([], 2), (["--trust-remote-code"], 0)):
            with pytest.raises(SystemExit) as ended:
                main([*command, *options])
            assert ended.value.code == status, command
            assert ("its own code, which is not executed" in capsys.readouterr().err) == (status == 2)
    for made in ("own-adapter", "encoded-own", "merged-own", "merged-trained", "exported-own", "out/final"):
        for path in (here / made).rglob("*.json"):
            assert "trust" not in path.read_text(), path
        if (here / made / "config.json").is_file():
            assert (here / made / "modeling_own.py").is_file()
    with pytest.raises(CheckpointError, match="its own code, which is not executed; .* or pass --trust-remote-code"):
        server_options(str(own_code), plugins=Stack.from_dict({"fp8": {}}))
    values, _ = server_options(str(own_code), ["--trust-remote-code"], plugins=Stack.from_dict({"fp8": {}}))
    assert "trust_remote_code" not in values
    assert values["hf_overrides"]["quantization_config"]["quant_method"] == "arctic"


@pytest.mark.parametrize("architectures", [5, "LlamaModel", [None], [["x"]], {}, ["LlamaModel" * 1000]])
@pytest.mark.parametrize("auto_map", [["x"], 3, {"AutoModel": ["y", None]}])
def test_names_of_classes_need_not_be_names(here, architectures, auto_map):
    change(here / "encoded", "config.json", architectures=architectures, auto_map=auto_map)
    for use in (load_model, lambda path: server_options(str(path))):
        with suppress(ArcticError):  # it is read, or refused in one line
            use(here / "encoded")


def change_plain(here, **values):
    path = here / "plain" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "text",
    [
        "? [a, b]\n: 1",
        "? {a: b}\n: 1",
        "plugins: {? [x] : 1}",
        "a: 1\na: 2",
        "&a [*a]",
        "!!python/object/apply:os.system [id]",
    ],
)
def test_a_recipe_that_is_odd_yaml_is_told_in_a_line(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.yaml (is not valid YAML|has the top-level type list)"):
        read_yaml(tmp_path / "recipe.yaml")


def test_messages_are_short_and_hold_no_commands_for_terminals():
    text = str(ConfigError("x\x1b[2Jy" + "z" * 10**6, expected="a\nb"))
    assert len(text) < 3000
    assert text.isprintable()
    assert "\\x1b[2J" in text


# ---- The cache of what is made once ----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path


def test_a_cache_is_for_its_user_alone(home):
    found = cache_directory("kernels")
    assert found == home / "home" / "arctic_plugins" / "kernels"
    assert stat.S_IMODE(found.stat().st_mode) == stat.S_IMODE(found.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("how", ["others may write", "another's", "another's link", "a file", "the parent"])
def test_a_cache_that_others_can_write_to_is_not_used(home, how, caplog, monkeypatch):
    found = cache_directory("kernels")
    if how == "others may write":
        found.chmod(0o777)
    elif how == "the parent":
        found.parent.chmod(0o775)
    elif how == "a file":
        found.rmdir()
        found.write_text("")
    elif os.geteuid() != 0:
        pytest.skip("only root can give files away")
    elif how == "another's":
        os.chown(found, 12345, 12345)
    else:
        found.rename(home / "mine")
        found.symlink_to(home / "mine")
        os.chown(found, 12345, 12345, follow_symlinks=False)
    fallback = cache_directory("kernels")
    assert fallback == home / "tmp" / f"arctic_plugins-{os.geteuid()}" / "kernels"
    assert "not used as a cache" in caplog.text
    fallback.parent.chmod(0o777)
    with pytest.raises(UserError, match="no directory can be used as a cache: .*set XDG_CACHE_HOME"):
        cache_directory("kernels")


def test_a_cache_without_a_home(home, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user without an entry
    assert cache_directory("offload") == home / "tmp" / f"arctic_plugins-{os.geteuid()}" / "offload"


# ---- Anything at all -------------------------------------------------------------------------------------------------

TEXTS = st.sampled_from(
    [
        "",
        "a",
        "..",
        "/etc/passwd",
        "/dev/zero",
        "--trust-remote-code",
        "**" * 20,
        "\x00",
        "\x1b[2J",
        "float32",
        "load",
        "\ud800",
        "é" * 50,
    ]
)
LEAVES = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | TEXTS | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FILES = {
    "encoded": (FILE_NAME, "config.json", "tokenizer_config.json", "generation_config.json"),
    "adapter": (FILE_NAME, ADAPTER, "tokenizer_config.json"),
    "sharded": ("model.safetensors.index.json",),
    "recipes": ("recipe.yaml",),
}
SIGNS = st.text("&*!|>{}[]:?-#%@`'\"\t\n \x00\x85\ufeff<", min_size=1, max_size=3)


def places(content, path=()):
    """Every key of a JSON value, as a path to it."""
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield (*path, key)
        yield from places(content[key], (*path, key))


@st.composite
def damages(draw, originals):
    checkpoint, name = draw(st.sampled_from(sorted(originals)))
    content = json.loads(originals[checkpoint, name])
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(content))
        if not known:  # every key was deleted
            break
        *parents, leaf = draw(st.sampled_from(known))
        section = content
        for parent in parents:
            section = section[parent]
        if draw(st.booleans()) or not isinstance(section, dict):
            section[leaf] = draw(VALUES)
        elif draw(st.booleans()):
            del section[leaf]
        else:
            section[draw(TEXTS)] = draw(VALUES)
    text = json.dumps(content)
    if name.endswith(".yaml") and draw(st.booleans()):
        text = yaml.safe_dump(content, default_flow_style=draw(st.booleans()))
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(SIGNS) + text[at:]
    return checkpoint, name, text


@pytest.mark.slow
def test_no_file_does_harm(here):
    """2,000 of them: each is read or refused in one line, soon, and nothing is written, started, connected to or
    executed.
    """
    for checkpoint in ("encoded", "adapter"):  # of files that are not what was saved nothing is read
        change(here / checkpoint, FILE_NAME, files={})
    shutil.copytree(here / "plain", here / "sharded")
    with safe_open(here / "sharded" / "model.safetensors", "np") as file:
        held = dict.fromkeys(file.keys(), "part.safetensors")
    (here / "sharded" / "model.safetensors").rename(here / "sharded" / "part.safetensors")
    (here / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": held})
    )
    (here / "recipes").mkdir()
    (here / "recipes" / "rows.jsonl").write_text('{"text": "a"}\n')
    recipe = {
        "model": str(here / "plain"),
        "plugins": {
            "fp8": {"bits": 8, "include": ["**.mlp.*"]},
            "lora": {"r": 4, "target_modules": ["q_proj"]},
            "offload": {"ratio": 0.5},
        },
        "load": {"dtype": "float32"},
        "data": {"path": "rows.jsonl", "format": "text", "max_length": 8, "columns": {"text": "text"}},
        "training": {"output_dir": "out", "learning_rate": 1e-4, "max_steps": 1},
        "nonfinite": "skip",
    }
    (here / "recipes" / "recipe.yaml").write_text(json.dumps(recipe))
    originals = {
        (checkpoint, name): (here / checkpoint / name).read_text()
        for checkpoint, names in FILES.items()
        for name in names
        if (here / checkpoint / name).is_file()
    }
    readers = {
        "encoded": (check_checkpoint, lambda path: server_options(str(path)), stack_from_checkpoint),
        "sharded": (check_checkpoint,),
        "recipes": (lambda path: check_recipe(Recipe.from_file(path / "recipe.yaml")),),
        "adapter": (
            read_adapter,
            stack_from_checkpoint,
            lambda path: server_options(str(path), base=str(here / "encoded")),
        ),
    }
    for checkpoint, uses in readers.items():
        for use in uses:
            use(here / checkpoint)
    refused = []

    @given(damages(originals))
    @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def harmless(damage):
        checkpoint, name, text = damage
        path = here / checkpoint / name
        path.write_text(text)
        try:
            for use in readers[checkpoint]:
                with watched(here) as done, soon():
                    try:
                        use(here / checkpoint)
                    except ArcticError as error:
                        refused.append(error)
                        assert "\n" not in str(error)
                assert done == []
        finally:
            path.write_text(originals[checkpoint, name])

    harmless()
    assert len(refused) > 200
