"""Hub ids where a directory could stand, and push_to_hub as in transformers, against a stub of the hub on this
machine.
"""

import importlib.util
import json
import shutil
from contextlib import closing
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from arctic_plugins_huggingface import load_model, save_checkpoint
from safetensors.torch import load_file

from arctic_plugins import Stack
from arctic_plugins.provenance import FILE_NAME
from arctic_plugins.testing import Forks, run_python

FP8 = Stack.from_dict({"fp8": {}})
PLUGINS = {"fp8": {}, "lora": {"r": 4}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The stub, and a process of its clients that has read its address: (hub, the home of their caches, forks)."""
    specification = importlib.util.spec_from_file_location("hub_stub", Path(__file__).with_name("hub.py"))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    home = tmp_path_factory.mktemp("home")
    with (
        module.Hub(tmp_path_factory.mktemp("hub")) as hub,
        closing(Forks(["arctic_plugins_huggingface.training.run"], hub.environment(home))) as forks,
    ):
        yield hub, home, forks


@pytest.fixture
def hub(server, tmp_path):
    """The stub without repositories, its clients without caches."""
    hub, home, _ = server
    hub.root, hub.requests, hub.unknown = tmp_path / "hub", [], []
    for cache in home.iterdir():
        shutil.rmtree(cache)
    yield hub
    assert not hub.unknown, "the stub was asked for what it does not know"


@pytest.fixture
def run(hub, server, tmp_path):
    """Run Python source, or the command line, in a process that sees the stub as the hub."""
    forks = server[2]
    return lambda *command, status=0: (
        forks.run(["-c", dedent(command[0])], cwd=tmp_path, status=status)
        if len(command) == 1
        else forks.arctic(*command, cwd=tmp_path, status=status)
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(10, 40)[None]).logits


def test_an_encoded_model_is_pushed_and_read_back_bitwise(hub, run, tiny_checkpoint):
    run(f"""
        from arctic_plugins import Stack
        from arctic_plugins_huggingface import load_model
        model, tokenizer = load_model({str(tiny_checkpoint)!r}, Stack.from_dict({{"fp8": {{}}}}))
        model.push_to_hub("someone/encoded")
        tokenizer.push_to_hub("someone/encoded")
    """)
    assert hub.files("someone/encoded") >= {"config.json", "model.safetensors", "tokenizer.json"}
    again, _ = load_model(hub.repository("someone/encoded"))
    assert torch.equal(logits(again), logits(load_model(tiny_checkpoint, FP8)[0]))
    done = run("""
        import torch
        from arctic_plugins_huggingface import load_model, register
        from transformers import AutoModelForCausalLM
        model, _ = load_model("someone/encoded", revision="main")
        register()
        stock = AutoModelForCausalLM.from_pretrained("someone/encoded")
        ids = torch.arange(10, 40)[None]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, stock(ids).logits)
            print("SUM", model(ids).logits.sum().item())
    """)
    assert float(done.stdout.split("SUM")[1]) == logits(again).sum().item()


def test_train_push_merge_and_generate_with_hub_ids_alone(hub, run, tiny_checkpoint, tmp_path):
    hub.put("someone/base", tiny_checkpoint)
    records = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(16)]
    data = tmp_path / "dataset"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    (data / "test.jsonl").write_text("\n".join(json.dumps(record) for record in records[:4]))
    hub.put("someone/numbers", data, "datasets")
    training = {"output_dir": "out", "max_steps": 2, "use_cpu": True, "bf16": False, "save_steps": 1}
    recipe = {
        "model": "someone/base",
        "plugins": PLUGINS,
        "data": {"path": "someone/numbers", "eval_split": "test"},
        "training": {**training, "push_to_hub": True, "hub_model_id": "someone/adapter"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert "eval loss" in run("train", "recipe.yaml").stdout
    assert hub.files("someone/adapter") >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        FILE_NAME,
        "tokenizer.json",
    }
    assert (
        json.loads((hub.repository("someone/adapter") / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "someone/base"
    )
    local = load_file(tmp_path / "out" / "final" / "adapter_model.safetensors")
    pushed = load_file(hub.repository("someone/adapter") / "adapter_model.safetensors")
    assert all(torch.equal(pushed[name], tensor) for name, tensor in local.items())
    generated = run("generate", "someone/adapter", "hi", "--max-new-tokens", "8").stdout
    run("merge", "someone/adapter", "merged")
    merged, _ = load_model(tmp_path / "merged")
    assert merged.config.quantization_config.codecs.codecs
    assert run("generate", "out/final", "hi", "--max-new-tokens", "8").stdout == generated
    run("quantize", "someone/base", "encoded")
    assert torch.equal(logits(load_model(tmp_path / "encoded")[0]), logits(load_model(tiny_checkpoint, FP8)[0]))


def test_the_ordinary_trainer_pushes_its_adapter(hub, run, tiny_checkpoint):
    run(f"""
        from transformers import Trainer
        from arctic_plugins import Stack
        from arctic_plugins_huggingface import ArcticTrainingArguments, attach, load_model
        args = ArcticTrainingArguments(output_dir="out", max_steps=2, save_steps=1, use_cpu=True, report_to="none",
                                       push_to_hub=True,
                                       hub_model_id="someone/trained", hub_strategy="checkpoint",
                                       plugins={PLUGINS!r})
        stack = Stack.from_dict(args.plugins)
        model, tokenizer = load_model({str(tiny_checkpoint)!r}, stack)
        rows = [{{"input_ids": list(range(10, 30)), "labels": list(range(10, 30))}}] * 8
        trainer = attach(Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer), stack)
        trainer.train()
        trainer.push_to_hub()
    """)
    assert hub.files("someone/trained") >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_what_the_hub_does_not_have_is_one_line(hub, run, tiny_checkpoint, tmp_path):
    hub.put("someone/base", tiny_checkpoint)
    for arguments, message in (
        (("generate", "someone/absent", "hi"), "someone/absent is neither a local directory nor available on the Hub"),
        (("merge", "someone/base", "out"), "someone/base has no adapter_config.json"),
    ):
        done = run(*arguments, status=2)
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    recipe = {
        "model": "someone/base",
        "data": {"path": "someone/nothing"},
        "training": {"output_dir": "out", "use_cpu": True},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = run("train", "recipe.yaml", status=2)
    assert (
        "data.path someone/nothing is not a local file and cannot be loaded as a dataset"
        in done.stderr.splitlines()[-1]
    )


def test_a_model_in_the_cache_is_used_when_the_hub_is_gone(hub, server, run, tiny_checkpoint, tmp_path):
    hub.put("someone/base", tiny_checkpoint)
    answer = run("generate", "someone/base", "hi", "--max-new-tokens", "4").stdout
    environment = {**hub.environment(server[1]), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = ["-m", "arctic_plugins.cli", "generate", "someone/base", "hi", "--max-new-tokens", 4]
    done = run_python(*command, environment=environment, cwd=tmp_path)
    assert done.stdout == answer, done.stderr
    assert "someone/base comes from the cache: http://127.0.0.1:9 cannot be reached" in done.stderr


def test_a_plugin_that_made_a_checkpoint_of_the_hub_is_named(hub, run, tiny_checkpoint, tmp_path):
    checkpoint = save_checkpoint(*load_model(tiny_checkpoint, FP8), tmp_path / "encoded", FP8)
    content = json.loads((checkpoint / FILE_NAME).read_text())
    (checkpoint / FILE_NAME).write_text(
        json.dumps({**content, "stack": {"nf3": {}}, "plugins": {"nf3": "someones-nf3==2.1"}})
    )
    hub.put("someone/encoded", checkpoint)
    done = run("generate", "someone/encoded", "hi", status=2)
    assert (
        "made with the plugin nf3, not installed here; according to the checkpoint, it is provided by "
        "'someones-nf3==2.1'" in done.stderr
    )
