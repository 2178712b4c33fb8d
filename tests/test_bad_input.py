"""Whatever is wrong with what a user gives: one line on stderr, exit status 2, nothing half-written.

A table of cases, then damage at random.
"""

import json
import random
import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from arctic_plugins_huggingface import load_model, save_checkpoint
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from safetensors.torch import load_file, save_file

from arctic_plugins import Stack
from arctic_plugins.cli import main
from arctic_plugins.errors import UserError
from arctic_plugins.provenance import FILE_NAME
from arctic_plugins.testing import Forks

RECORD = {"instruction": "Say hello.", "output": "hello"}
STACK = {"fp8": {"group_size": 64}, "lora": {"r": 4}}


@pytest.fixture(scope="module")
def made(tiny_checkpoint, tmp_path_factory):
    """A plain model, an encoded one, a sharded one, an adapter, data and a recipe."""
    directory = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_checkpoint, directory / "plain")
    fp8, lora = Stack.from_dict({"fp8": {}}), Stack.from_dict(STACK)
    model, tokenizer = load_model(tiny_checkpoint, fp8)
    save_checkpoint(model, tokenizer, directory / "encoded", fp8)
    model.save_pretrained(directory / "sharded", max_shard_size="100KB")
    tokenizer.save_pretrained(directory / "sharded")
    save_checkpoint(*load_model(tiny_checkpoint, lora), directory / "adapter", lora)
    (directory / "data.jsonl").write_text(f"{json.dumps(RECORD)}\n" * 8)
    training = {"output_dir": "out", "max_steps": 1, "use_cpu": True, "bf16": False}
    recipe = {"model": "plain", "plugins": STACK, "data": {"path": "data.jsonl"}, "training": training}
    (directory / "recipe.yaml").write_text(json.dumps(recipe))
    return directory


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy to break, with the working directory in it."""
    shutil.copytree(made, tmp_path / "here")
    adapter = tmp_path / "here" / "adapter" / "adapter_config.json"
    rewrite(adapter, base_model_name_or_path="plain")
    unrecord(tmp_path / "here" / "adapter", adapter.name)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def rewrite(path, **changes):
    """Change keys of a JSON file, ``a__b`` for nested ones; None deletes."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        section = content
        for parent in parents:
            section = section[parent]
        section[leaf] = value
        if value is None:
            del section[leaf]
    path.write_text(json.dumps(content))


def unrecord(checkpoint, *names):
    """Forget the digests of some files, or all: as if the damage had been there when the checkpoint was saved."""
    content = json.loads((checkpoint / FILE_NAME).read_text())
    content["files"] = {name: record for name, record in content["files"].items() if names and name not in names}
    (checkpoint / FILE_NAME).write_text(json.dumps(content))


def retensor(checkpoint, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    unrecord(checkpoint)


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as raised:
        main(list(arguments))
    return raised.value.code, capsys.readouterr().err


SHARD = "sharded/model-00002-of-00004.safetensors"
KEY = "model.layers.1.mlp.up_proj.weight"
ENCODED = ("generate", "encoded", "hi")
TRAIN = ("train", "recipe.yaml")
NEW = ("new-plugin", "--kind", "codec")


def plain_tensors(change):
    def damage(here):
        tensors = load_file(here / "plain/model.safetensors")
        change(tensors)
        save_file(tensors, here / "plain/model.safetensors", {"format": "pt"})

    return damage


def recipe(**changes):
    return lambda here: rewrite(here / "recipe.yaml", **changes)


def config(**changes):
    def damage(here):
        rewrite(here / "encoded/config.json", **changes)
        unrecord(here / "encoded")

    return damage


def write(name, text):
    return lambda here: (here / name).write_text(text)


CASES = {
    # checkpoints: files
    "no such directory": (
        None,
        ("generate", "./nowhere", "hi"),
        "./nowhere does not exist; expected a checkpoint directory or a Hub id",
    ),
    "a file": (None, ("generate", "data.jsonl", "hi"), "data.jsonl is a file; expected a checkpoint directory"),
    "an empty directory": (
        lambda here: (here / "empty").mkdir(),
        ("generate", "empty", "hi"),
        "empty/config.json does not exist",
    ),
    "no weights": (
        lambda here: (here / "plain/model.safetensors").unlink(),
        ("generate", "plain", "hi"),
        "has no model.safetensors",
    ),
    "truncated in the header": (
        lambda here: truncate(here / "plain/model.safetensors", 100),
        ("generate", "plain", "hi"),
        "is damaged or truncated",
    ),
    "truncated in the data": (
        lambda here: truncate(here / "plain/model.safetensors", 200_000),
        ("generate", "plain", "hi"),
        "is damaged or truncated",
    ),
    "empty weights": (
        lambda here: truncate(here / "plain/model.safetensors", 0),
        ("generate", "plain", "hi"),
        "is damaged or truncated",
    ),
    "truncated after saving": (
        lambda here: truncate(here / "encoded/model.safetensors", 200_000),
        ENCODED,
        "has 200000 bytes; expected the",
    ),
    "no tokenizer": (
        lambda here: (here / "plain/tokenizer.json").unlink(),
        ("generate", "plain", "hi"),
        "the tokenizer of plain cannot be read",
    ),
    "bad tokenizer": (
        write("plain/tokenizer.json", "{}"),
        ("generate", "plain", "hi"),
        "the tokenizer of plain cannot be read",
    ),
    "an index that names an absent shard": (
        lambda here: (here / SHARD).unlink(),
        ("generate", "sharded", "hi"),
        "index of sharded lists model-00002-of-00004",
    ),
    "a truncated shard": (
        lambda here: truncate(here / SHARD, 50_000),
        ("generate", "sharded", "hi"),
        "is damaged or truncated",
    ),
    "a bad index": (
        write("sharded/model.safetensors.index.json", '{"weight_map": 3}'),
        ("generate", "sharded", "hi"),
        "has no valid 'weight_map'",
    ),
    "an index that is no JSON": (
        write("sharded/model.safetensors.index.json", "{"),
        ("generate", "sharded", "hi"),
        "is not valid JSON",
    ),
    "a shard that lacks a tensor": (
        lambda here: shutil.copy(here / SHARD, here / "sharded/model-00001-of-00004.safetensors"),
        ("generate", "sharded", "hi"),
        "model-00001-of-00004.safetensors lacks",
    ),
    # checkpoints: config.json
    "config.json is no JSON": (
        write("plain/config.json", '{"a": '),
        ("generate", "plain", "hi"),
        "config.json is not valid JSON: .*line 1 column",
    ),
    "config.json is a list": (
        write("plain/config.json", "[]"),
        ("generate", "plain", "hi"),
        "config.json has the top-level type list; expected an object",
    ),
    "config.json without model_type": (
        config(model_type=None),
        ENCODED,
        "has model_type None; expected a type of model",
    ),
    "unknown model_type": (config(model_type="lama"), ENCODED, "config.json cannot be read as the config"),
    "a bad value in config.json": (
        config(hidden_size="wide"),
        ENCODED,
        "config.json cannot be read as the config",
    ),
    "sizes that do not fit": (config(num_attention_heads=3, head_dim=None), ENCODED, "config.json|shape"),
    "another model's config.json": (config(vocab_size=300), ENCODED, "has shape|cannot be loaded"),
    "more layers than weights": (config(num_hidden_layers=3), ENCODED, r"is missing|lacks"),
    # checkpoints: encoded weights
    "a newer format": (
        config(quantization_config__format=2),
        ENCODED,
        "quantization_config has format 2; expected at most 1; upgrade",
    ),
    "no format": (config(quantization_config__format=None), ENCODED, "quantization_config.format is None"),
    "no codecs": (config(quantization_config__codecs=None), ENCODED, "quantization_config.codecs is None"),
    "codecs of another kind": (config(quantization_config__codecs=["fp8"]), ENCODED, "quantization_config.codecs is"),
    "an unknown codec id": (config(quantization_config__modules={"a": "x"}), ENCODED, r"names the codecs \['x'\]"),
    "modules of another model": (
        config(quantization_config__modules={"a": "fp8"}),
        ENCODED,
        "matches no linear module",
    ),
    "a codec with bad options": (config(quantization_config__codecs__fp8__bits=5), ENCODED, "is not valid"),
    "a codec nobody provides": (
        config(quantization_config__codecs__fp8__type="fp3"),
        ENCODED,
        "no installed plugin provides the checkpoint's codec type 'fp3'; install the plugin",
    ),
    "a missing scale": (
        lambda here: retensor(here / "encoded", lambda t: t.pop(f"{KEY}_scale")),
        ENCODED,
        f"{KEY}_scale is missing",
    ),
    "missing codes": (lambda here: retensor(here / "encoded", lambda t: t.pop(KEY)), ENCODED, f"{KEY} is missing"),
    "a missing plain tensor": (
        lambda here: retensor(here / "encoded", lambda t: t.pop("model.norm.weight")),
        ENCODED,
        "lacks 1 weights",
    ),
    "codes of another shape": (
        lambda here: retensor(here / "encoded", lambda t: t.update({KEY: t[KEY][:-1].clone()})),
        ENCODED,
        rf"{KEY} is U8 \(175, 1, 64\); expected U8 \(176, 1, 64\)",
    ),
    "a scale of another dtype": (
        lambda here: retensor(here / "encoded", lambda t: t.update({f"{KEY}_scale": t[f"{KEY}_scale"].half()})),
        ENCODED,
        f"{KEY}_scale is F16",
    ),
    "a plain tensor of another shape": (
        lambda here: retensor(here / "encoded", lambda t: t.update({"model.norm.weight": torch.ones(63)})),
        ENCODED,
        r"model.norm.weight has shape \(63,\); expected \(64,\)",
    ),
    "a plain model's tensor of another shape": (
        plain_tensors(lambda t: t.update({"model.norm.weight": torch.ones(63)})),
        ("generate", "plain", "hi"),
        "cannot be loaded",
    ),
    "NaN to encode": (
        plain_tensors(lambda t: t[KEY].fill_(float("nan"))),
        ("quantize", "plain", "out"),
        f"{KEY}: the weight holds NaN",
    ),
    # checkpoints: what made them
    "a newer arctic_plugins.json": (
        lambda here: rewrite(here / f"encoded/{FILE_NAME}", format=2),
        ENCODED,
        "has format 2; expected at most 1; upgrade",
    ),
    "a bad arctic_plugins.json": (write(f"encoded/{FILE_NAME}", "{"), ENCODED, "arctic_plugins.json is not valid JSON"),
    "a plugin that is not installed": (
        lambda here: rewrite(here / f"encoded/{FILE_NAME}", stack={"nf3": {}}, plugins={"nf3": "someones-nf3==2.1"}),
        ENCODED,
        (
            "made with the plugin nf3, not installed here; according to the checkpoint, it is provided by "
            "'someones-nf3==2.1', which runs as code"
        ),
    ),
    "an adapter whose save was cut off": (
        lambda here: (here / f"adapter/{FILE_NAME}").unlink(),
        ("merge", "adapter", "out"),
        "has no arctic_plugins.json",
    ),
    "an adapter without weights": (
        lambda here: (here / "adapter/adapter_model.safetensors").unlink(),
        ("merge", "adapter", "out"),
        "is missing",
    ),
    "an adapter whose base is gone": (
        lambda here: (here / "plain").rename(here / "moved"),
        ("merge", "adapter", "out"),
        "'plain' is neither a local directory nor in the Hub's cache",
    ),
    "what is no adapter": (None, ("merge", "plain", "out"), "has no adapter_config.json; expected an adapter"),
    "what is encoded already": (
        None,
        ("quantize", "encoded", "out"),
        "encoded is already encoded; expected a plain checkpoint",
    ),
    "an output that exists": (None, ("quantize", "plain", "encoded"), "encoded exists and is not empty"),
    "plugins that encode nothing": (None, ("quantize", "plain", "out", "--plugins", "lora"), "encodes nothing"),
    "nothing to serve": (None, ("serve", "./nowhere"), "has no config.json"),
    "a damaged checkpoint to serve": (
        lambda here: truncate(here / "encoded/model.safetensors", 9),
        ("serve", "encoded"),
        "has 9 bytes; expected the",
    ),
    "plugins that do nothing in vLLM": (
        None,
        ("serve", "plain", "--plugins", "deepspeed"),
        "--plugins deepspeed does nothing in vLLM; expected plugins that encode weights, such as fp8, or",
    ),
    "a draft model that is not named": (
        None,
        ("serve", "encoded", "--plugins", '{"speculate": {"method": "draft"}}'),
        "method 'draft' and no model",
    ),
    "a draft model with another vocabulary": (
        lambda here: rewrite(here / "plain/config.json", vocab_size=300),
        ("serve", "encoded", "--plugins", '{"speculate": {"method": "draft", "model": "plain"}}'),
        "the draft model plain has a vocabulary of 300 tokens; expected 272",
    ),
    "drafts for a model that generates nothing": (
        None,
        ("serve", "encoded", "--plugins", "speculate", "--runner", "pooling"),
        "'speculate' is for models that generate text, and encoded is a pooling model",
    ),
    # recipes and data
    "no recipe": (None, ("train", "nowhere.yaml"), "nowhere.yaml does not exist"),
    "a recipe that is no YAML": (write("recipe.yaml", "model: [\n"), TRAIN, "recipe.yaml is not valid YAML: .*line"),
    "a recipe that is a list": (
        write("recipe.yaml", "- a\n"),
        TRAIN,
        "recipe.yaml has the top-level type list; expected a mapping",
    ),
    "a recipe of bytes": (lambda here: (here / "recipe.yaml").write_bytes(b"\xff\x00"), TRAIN, "cannot be read"),
    "a key twice": (write("recipe.yaml", "model: a\nmodel: b\n"), TRAIN, "the key 'model' is duplicated .*line 2"),
    "an unknown key": (recipe(modle="x"), TRAIN, "modle is not an option; did you mean 'model'"),
    "a section of another kind": (
        recipe(plugins=["fp8"]),
        TRAIN,
        "recipe.yaml.plugins is .*; expected a valid dictionary",
    ),
    "no data section": (write("recipe.yaml", "model: plain\nplugins:\ndata:\n"), TRAIN, "recipe.yaml.data is missing"),
    "an unknown plugin": (recipe(plugins={"fp9": {}}), TRAIN, "did you mean 'fp8'"),
    "nothing to train": (
        recipe(plugins={"fp8": {}}),
        TRAIN,
        r"freeze the weights \(fp8\), and none adds trainable parameters; .*lora",
    ),
    "options that exclude each other": (
        recipe(plugins={"bnb": {"type": "int8", "double_quant": True}, "lora": {}}),
        TRAIN,
        "double_quant requires type 'nf4'",
    ),
    "an unknown option": (
        recipe(plugins={"fp8": {"bit": 8}}),
        TRAIN,
        "plugins.fp8.bit is not an option; did you mean 'bits'",
    ),
    "a bad option": (recipe(plugins={"fp8": {"bits": 7}}), TRAIN, "plugins.fp8.bits is 7; expected 6, 8 or 12"),
    "an unknown training argument": (recipe(training__learning_rat=1), TRAIN, "did you mean 'learning_rate'"),
    "a bad training argument": (recipe(training__lr_scheduler_type="zigzag"), TRAIN, "training is not valid: .*zigzag"),
    "a training argument of another type": (recipe(training__max_steps="many"), TRAIN, "training"),
    "a negative learning rate": (recipe(training__learning_rate=-1.0), TRAIN, "learning_rate|Invalid"),
    "Liger's kernels without a GPU or their package": (
        recipe(training__use_liger_kernel=True),
        TRAIN,
        "use_liger_kernel is on, but (liger-kernel is not installed|training runs on the CPU); expected",
    ),
    "a tracker that is not installed": (
        recipe(training__report_to=["comet_ml"]),
        TRAIN,
        "report_to names integrations that are not installed: comet_ml; run 'pip install",
    ),
    "arguments that only the trainer checks": (
        recipe(
            training__eval_strategy="steps",
            training__load_best_model_at_end=True,
            training__save_strategy="epoch",
            data__eval_size=1,
        ),
        TRAIN,
        "training is not valid",
    ),
    "no output_dir": (recipe(training={}), TRAIN, "training.output_dir is missing"),
    "an output_dir in use": (
        lambda here: shutil.copytree(here / "plain", here / "out"),
        TRAIN,
        "out exists and is not empty.*--resume.*--overwrite",
    ),
    "an output_dir that is a file": (
        recipe(training__output_dir="data.jsonl"),
        TRAIN,
        "data.jsonl is a file; expected a directory",
    ),
    "a dataset that is nowhere": (
        recipe(data={"path": "someone/nothing"}),
        TRAIN,
        "cannot be loaded as a dataset: .* cannot be reached",
    ),
    "resume and overwrite": (None, (*TRAIN, "--resume", "--overwrite"), "are mutually exclusive"),
    "no data": (recipe(data={"path": "nowhere.jsonl"}), TRAIN, "data.path nowhere.jsonl does not exist"),
    "empty data": (write("data.jsonl", ""), TRAIN, "data.jsonl is empty"),
    "malformed data": (
        write("data.jsonl", f"{json.dumps(RECORD)}\n" * 3 + "{\n"),
        TRAIN,
        "data.jsonl:4 is not valid JSON",
    ),
    "data that lack a column": (write("data.jsonl", '{"instruction": "a"}'), TRAIN, "data.jsonl:1 has no 'output'"),
    "all rows too long": (
        recipe(data__max_length=3),
        TRAIN,
        "no row of data.jsonl has anything left .*raise data.max_length",
    ),
    "streaming without max_steps": (
        recipe(data__streaming=True, training__max_steps=None),
        TRAIN,
        "training.max_steps is not set",
    ),
    "nothing to evaluate on": (recipe(training__eval_strategy="epoch"), TRAIN, "nothing to evaluate on"),
    "a module that is not there": (
        recipe(plugins={"fp8": {"include": ["**.experts.*"]}, "lora": {}}),
        TRAIN,
        "matches no linear module",
    ),
    "a field of LoraConfig that is not an option": (
        recipe(plugins={"lora": {"megatron_core": "x"}}),
        TRAIN,
        "plugins.lora.megatron_core cannot be set: models of Megatron are not supported; leave it out",
    ),
    "an adapter that would not fit its base model": (
        recipe(plugins={"lora": {"init_lora_weights": "pissa"}}),
        TRAIN,
        "PiSSA changes the base weights, so the adapter would not fit the base model; write a script",
    ),
    "modules that vLLM fuses": (
        recipe(plugins={"fp8": {"exclude": ["**.q_proj"]}, "lora": {}}),
        TRAIN,
        "different codecs, but vLLM fuses them",
    ),
    "no command": (None, ("trian", "x"), "did you mean 'train'"),
    "a new plugin of no kind": (None, ("new-plugin", "mine", "--kind", "codek"), "'codek' is not one of 'codec'"),
    "a plugin's name with capitals": (
        None,
        (*NEW, "Mine"),
        "'Mine' cannot be the name of a plugin; expected lowercase",
    ),
    "a plugin's name that is a path": (None, (*NEW, "../mine"), "'../mine' cannot be the name of a plugin"),
    "a plugin's name that is too long": (None, (*NEW, "a" * 300), "cannot be written: File name too long"),
    "a plugin that exists": (write("mine", ""), (*NEW, "mine"), "/mine exists already; choose another name"),
    "a plugin of this project": (None, (*NEW, "fp8"), "plugin 'fp8' is installed already, by arctic-plugins-fp8"),
    "a package of this project": (None, (*NEW, "plugins"), "'plugins' is the name of a plugin of arctic-plugins"),
    "a plugin called as a command": (
        None,
        (*NEW, "train"),
        "command 'train' is installed already, by arctic-plugins-h",
    ),
    "a plugin called as a keyword": (
        None,
        (*NEW, "none"),
        "the class would be called None, which means something else",
    ),
    "a plugin called as a class": (None, (*NEW, "plugin"), "the class would be called Plugin, which means something"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_written(here, capsys, monkeypatch, case):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    damage, arguments, message = CASES[case]
    if damage:
        damage(here)
    before = sorted(here.rglob("*"))
    status, error = run(capsys, *arguments)
    lines = [line for line in error.splitlines() if line.startswith("arctic: ")]
    assert status == 2, error
    assert len(lines) == 1, error
    assert "Traceback" not in error
    assert re.search(message, lines[0]), lines[0]
    assert sorted(here.rglob("*")) == before, "something was left behind"


def test_there_are_enough_cases():
    assert len(CASES) >= 40


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A process that has imported with a hub that nobody reaches, and forks."""
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path_factory.mktemp("home"))}
    with closing(Forks(["arctic_plugins_huggingface.training.run"], environment)) as forks:
        yield forks


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"


@pytest.mark.parametrize(
    "arguments",
    [["quantize", "plain", "out"], ["merge", "adapter", "out"], ["train", "recipe.yaml"]],
    ids=lambda a: a[0],
)
def test_a_disk_that_takes_no_more(here, offline, arguments):
    """A limit on file sizes makes writes fail in the middle, as a full disk does."""
    done = offline.run(["-c", f"{LIMIT} from arctic_plugins.cli import main; main({arguments!r})"], cwd=here, status=2)
    assert (
        "out cannot be written: " in done.stderr.splitlines()[-1]
        or "final cannot be written: " in done.stderr.splitlines()[-1]
    ), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(here.rglob("*.unfinished"))
    assert not list((here / "out").rglob(FILE_NAME)), "something incomplete is marked as complete"


@pytest.mark.parametrize(
    "arguments",
    [["generate", "someone/model", "hi"], ["generate", "oneword", "hi"], ["merge", "someone/adapter", "out"]],
    ids=lambda a: a[1],
)
def test_a_hub_id_offline_is_told_at_once(offline, tmp_path, arguments):
    done = offline.arctic(*arguments, cwd=tmp_path, status=2)
    last = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert f"'{arguments[1]}' is neither a local directory nor in the Hub's cache" in last
    assert "http://127.0.0.1:9 cannot be reached" in last


def logits(checkpoint):
    model, tokenizer = load_checkpoint(checkpoint)
    with torch.no_grad():
        return torch.cat(
            [
                model(torch.arange(10, 40)[None]).logits[0],
                torch.tensor(tokenizer("Hello, you!")["input_ids"])[:, None].expand(-1, 272),
            ]
        )


@pytest.mark.parametrize("name", ["encoded", "adapter"])
def test_no_flipped_or_cut_byte_of_a_checkpoint_gives_another_model(here, name):
    """Every file of the checkpoint, at random places: an error of the user's kind, or the very same model."""
    expected, choose = logits(here / name), random.Random(0)
    shutil.copytree(here / name, here / "sound")
    unrecorded = json.loads((here / "sound" / FILE_NAME).read_text())["files"].keys()
    files = sorted(path for path in (here / name).iterdir() if path.name in unrecorded or path.name == FILE_NAME)
    errors = 0
    for turn in range(60):
        victim = files[turn % len(files)]
        sound = victim.read_bytes()
        at = choose.randrange(len(sound))
        broken = (
            sound[:at]
            if turn % 3 == 0
            else sound[:at] + bytes([sound[at] ^ (1 << choose.randrange(8))]) + sound[at + 1 :]
        )
        victim.write_bytes(broken)
        try:
            assert torch.equal(logits(here / name), expected), f"{victim.name} broken at {at} gives another model"
        except UserError as error:
            assert "\n" not in str(error)
            errors += 1
        victim.write_bytes(sound)
    assert errors > 40


def test_no_cut_of_a_plain_checkpoint_gives_another_model(here):
    """Other people's checkpoints have no digests; lengths and headers are checked all the same."""
    expected, choose = logits(here / "plain"), random.Random(1)
    for turn in range(20):
        victim = here / "plain" / ("model.safetensors", "config.json")[turn % 2]
        sound = victim.read_bytes()
        victim.write_bytes(sound[: choose.randrange(len(sound) - 1)])
        with pytest.raises(UserError):
            logits(here / "plain")
        victim.write_bytes(sound)
    assert torch.equal(logits(here / "plain"), expected)


def test_no_damaged_recipe_gives_a_traceback(here, capsys):
    choose, sound = random.Random(2), (here / "recipe.yaml").read_bytes()
    statuses = set()
    for turn in range(120):
        at = choose.randrange(len(sound))
        flipped = sound[:at] + bytes([sound[at] ^ (1 << choose.randrange(8))]) + sound[at + 1 :]
        (here / "recipe.yaml").write_bytes(sound[:at] if turn % 3 == 0 else flipped)
        status, error = run(capsys, "train", "recipe.yaml", "--dry-run")
        assert status in (0, 2), (status, error, (here / "recipe.yaml").read_bytes())
        assert "Traceback" not in error
        statuses.add(status)
        assert Path("plain").is_dir()
    assert statuses == {0, 2}
