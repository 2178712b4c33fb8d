"""Fixtures of the tests that cross rooms."""

import configparser
import json
import os
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest

from arctic_plugins.cli import _commands
from arctic_plugins.discovery import process_registry

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def distributions():
    """The folder of each distribution of this repository -> its ``pyproject.toml``, the core first."""
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["arctic-plugins"]["distributions"]
    paths = sorted(path for folder in workspace for path in ROOT.glob(f"{folder}/pyproject.toml"))
    return {path.parent: tomllib.loads(path.read_text()) for path in [ROOT / "pyproject.toml", *paths]}


@pytest.fixture(scope="session")
def installed():
    """A context manager that installs the distribution in a folder, with its metadata in another one and without a
    build.

    Gives the value of ``PYTHONPATH`` with which it is also installed for child processes.
    """

    @contextmanager
    def install(source, site):
        project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
        metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        metadata.mkdir(parents=True)
        header = {"Metadata-Version": "2.1", "Name": project["name"], "Version": project["version"]}
        (metadata / "METADATA").write_text("".join(f"{key}: {value}\n" for key, value in header.items()))
        points = configparser.ConfigParser(delimiters="=")
        points.read_dict(project["entry-points"])
        with (metadata / "entry_points.txt").open("w") as file:
            points.write(file)
        paths = [str(site), str(source)]
        sys.path[:0] = paths
        forget()
        yield os.pathsep.join(paths)
        for path in paths:
            sys.path.remove(path)
        forget()

    def forget():
        process_registry.cache_clear()
        _commands.cache_clear()

    return install


@pytest.fixture(scope="session")
def int8_plugin(installed, tmp_path_factory):
    """The third party's plugin of ``tests/releases/1/int8``, installed as its own distribution for the session.

    Gives ``PYTHONPATH`` for child processes.
    """
    with installed(ROOT / "tests" / "releases" / "1" / "int8", tmp_path_factory.mktemp("site")) as paths:
        yield paths


@pytest.fixture(scope="module")
def traced(installed, tmp_path_factory):
    """The plugin of ``tests/traced``, installed for a module's tests.

    Gives variables for child processes, and a function that returns what their processes wrote down.
    """
    tmp_path = tmp_path_factory.mktemp("traced")
    trace = tmp_path / "trace.jsonl"
    with installed(ROOT / "tests" / "traced", tmp_path / "site") as paths:
        path = os.pathsep.join([paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        yield (
            {"PYTHONPATH": path, "ARCTIC_TEST_TRACE": str(trace)},
            lambda: [json.loads(line) for line in trace.read_text().splitlines()],
        )


@pytest.fixture
def train_relative(tmp_path):
    """A function that takes a name of ``LLAMA_LIKE`` or ``MIXTURES`` through a recipe: a tiny random model of that
    kind, encoded (by the plugin and its options in ``codec``), trained, merged.

    Gives (plain checkpoint, the training's result, merged checkpoint).
    """
    from arctic_plugins_huggingface import merge_adapter
    from arctic_plugins_huggingface.training.recipe import Recipe
    from arctic_plugins_huggingface.training.run import train

    from arctic_plugins.testing import LLAMA_LIKE, MIXTURES, tiny_model

    def run(name, codec={"fp8": {"group_size": 64}}):  # noqa: B006 - only read
        directory = tmp_path / name
        model_type, config = (LLAMA_LIKE | MIXTURES)[name]
        checkpoint = tiny_model(directory / "plain", model_type, **config)
        records = [{"instruction": f"Say {number}.", "output": str(number)} for number in range(16)]
        (directory / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
        training = {
            "output_dir": str(directory / "out"),
            "max_steps": 6,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
        }
        recipe = {
            "model": str(checkpoint),
            "plugins": {**codec, "lora": {"r": 4}},
            "data": {"path": "data.jsonl", "max_length": 64, "packing": True},
            "training": training,
        }
        (directory / "recipe.yaml").write_text(json.dumps(recipe))
        result = train(Recipe.from_file(directory / "recipe.yaml"))
        return checkpoint, result, merge_adapter(result.directory, directory / "merged")

    return run
