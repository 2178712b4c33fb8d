"""What is imported before it is needed: nothing."""

import json

import pytest

from arctic_plugins.testing import run_python

HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "bitsandbytes", "deepspeed", "vllm")


def imported(code, *arguments):
    """Which of HEAVY are imported after ``code`` in a new interpreter, and what it said on standard error."""
    code = f"import json, sys\n{code}\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = run_python("-c", code, *arguments)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_loading_needs_no_trainer_no_adapters_and_no_data():
    assert imported("import arctic_plugins_huggingface.loading.load")[0] == ["torch", "transformers"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "does/not/exist/here"}, "does/not/exist/here"),
        ({"plugins": {"fp8": {"bits": 9}, "lora": {}}}, "fp8.bits is 9"),
        ({"plugins": {"fp9": {}}}, "did you mean 'fp8'"),
        ({"plugins": {"fp8": {}}}, "add 'lora: {}'"),
        ({"data": {"path": "absent.jsonl", "format": "alpaca"}}, "absent.jsonl does not exist"),
        ({"training": {"output_dir": "out", "learning_rat": 1e-3}}, "did you mean 'learning_rate'"),
        ({"training": {"output_dir": "out", "learning_rate": "fast"}}, "training.learning_rate is 'fast'"),
        ({"training": {}}, "training.output_dir is missing"),
    ],
    ids=["model", "option", "plugin", "nothing to train", "data", "argument", "value", "output"],
)
def test_an_error_in_a_recipe_is_told_before_libraries_are_imported(tmp_path, tiny_checkpoint, change, message):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    recipe = {
        "model": str(tiny_checkpoint),
        "plugins": {"fp8": {}, "lora": {}},
        "data": {"path": str(tmp_path / "rows.jsonl"), "format": "alpaca"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe | {"training": {"output_dir": str(tmp_path / "out")}} | change))
    code = (
        "from arctic_plugins.cli import main\ntry:\n    main(['train', sys.argv[1]])\nexcept SystemExit as "
        "ended:\n    assert ended.code == 2"
    )
    modules, said = imported(code, str(path))
    assert modules == []
    assert message in said
    assert len(said.splitlines()) == 1
