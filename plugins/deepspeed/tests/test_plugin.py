"""What the hosts are told of DeepSpeed, and what they say where nobody tells them."""

from types import SimpleNamespace

import pytest
from arctic_plugins_huggingface import load_model
from arctic_plugins_huggingface.training.check import check_recipe
from arctic_plugins_huggingface.training.engines import engine_mixins
from arctic_plugins_huggingface.training.recipe import Recipe

from arctic_plugins import Stack, discovery
from arctic_plugins.cli import main
from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import PluginNotFoundError
from arctic_plugins.testing import run_python

MISSING = "pip install arctic-plugins-deepspeed"


@pytest.fixture
def arctic(capsys):
    """A function that runs the command in this process and gives (exit status, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def uninstalled(monkeypatch):
    """As if the distribution were not there."""
    others = {name: found for name, found in discovery.installed_plugins().items() if name != "deepspeed"}
    monkeypatch.setattr(discovery, "installed_plugins", lambda: others)
    process_registry.cache_clear()
    yield
    process_registry.cache_clear()


def test_the_help_of_convert_shows_what_the_format_asks_for_and_imports_nothing_heavy():
    code = (
        "import sys; from arctic_plugins.cli import arctic; arctic.main(['convert', '--help'], standalone_mode=False); "
        "print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    output = run_python("-c", code).stdout
    assert output.splitlines()[-1] == "[]"
    text = " ".join(output.split())
    assert "--scaling [alpha/r|alpha/sqrt(r)] deepspeed: The factor by which updates are multiplied" in text
    assert "--alpha FLOAT deepspeed: " in text
    assert "--base TEXT deepspeed: " in text
    assert "deepspeed A training run with DeepSpeed-MoE, or with OptimizedLinear and LoRA" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--from", "deepspeedfp", "--alpha", "1"],
            "--scaling, --alpha and --base are for --from deepspeed, not deepspeedfp; leave them out",
        ),
        (["--from", "deepspeed", "--alpha", "much"], "'--alpha': 'much' is not a valid float"),
        (["--from", "deepspeed", "--scaling", "r"], "'--scaling': 'r' is not one of 'alpha/r', 'alpha/sqrt(r)'"),
        (["--from", "deepspeed", "--bits", "8"], "No such option '--bits'"),
        (["--from", "deepsped"], "no installed plugin converts from 'deepsped'; did you mean 'deepspeed'?"),
    ],
)
def test_options_of_another_format_are_refused(arctic, arguments, message):
    status, _, error = arctic("convert", "run", "out", *arguments)
    assert (status, len(error.splitlines())) == (2, 1)
    assert message in error


def test_a_hostfile_that_is_not_there(arctic, tmp_path):
    status, _, error = arctic("train", write(tmp_path), "--hostfile", tmp_path / "hosts")
    assert status == 2
    assert "hosts does not exist; expected a file with lines such as 'host slots=8'" in error


def write(directory):
    """A recipe, whose other files are not looked at."""
    path = directory / "recipe.yaml"
    path.write_text("{model: absent, data: {path: rows.jsonl}, training: {output_dir: out}}")
    return path


@pytest.mark.usefixtures("uninstalled")
@pytest.mark.parametrize(
    "arguments",
    [["--from", "deepspeed"], ["--from", "deepspeed", "--base", "model"], ["--base=model", "--from=deepspeed"]],
)
def test_without_the_plugin_convert_says_what_to_install(arctic, arguments):
    status, _, error = arctic("convert", "run", "out", *arguments)
    assert (status, error) == (2, f"arctic: no installed plugin converts from 'deepspeed'; {MISSING}\n")


@pytest.mark.usefixtures("uninstalled")
def test_without_the_plugin_a_hostfile_says_what_to_install(arctic, tmp_path):
    status, _, error = arctic("train", write(tmp_path), "--hostfile", tmp_path / "hosts")
    assert status == 2
    assert f"no installed plugin provides a launcher for --hostfile; {MISSING}" in error


@pytest.mark.usefixtures("uninstalled")
def test_without_the_plugin_only_a_plain_model_trains(tiny_checkpoint):
    plain, _ = load_model(tiny_checkpoint)
    assert engine_mixins(SimpleNamespace(model=plain), "deepspeed") == []
    encoded, _ = load_model(tiny_checkpoint, Stack.from_dict({"fp8": {"group_size": 64}}))
    with pytest.raises(PluginNotFoundError, match=f"^training.deepspeed with frozen or spread weights: .*{MISSING}$"):
        engine_mixins(SimpleNamespace(model=encoded), "deepspeed")
    training = {"output_dir": "out", "deepspeed": "zero2.json"}
    recipe = Recipe(model=str(tiny_checkpoint), plugins={"fp8": {}, "lora": {}}, data={"path": "a"}, training=training)
    with pytest.raises(PluginNotFoundError, match=MISSING):
        check_recipe(recipe)
