"""`examples/quickstart.ipynb` is run, and does what its text promises."""

import json
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """The name of each cell -> what it printed, and the value of its last line."""
    return {
        cell.id: "".join(output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell.outputs)
        for cell in code(notebook)
    }


def test_what_is_stored_is_one_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_a_model_learns_over_either_codec(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    stored, notebook = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    notebook.cells.append(nbformat.v4.new_code_cell("import json\n\nprint(json.dumps(losses))", id="losses"))
    NotebookClient(notebook, timeout=600, startup_timeout=300).execute(cwd=str(tmp_path))
    found = printed(notebook)
    losses = json.loads(found["losses"])
    assert losses.keys() == {"fp8", "nf4"}
    assert all(values[-1] < values[0] / 2 for values in losses.values())
    assert found["compare"] == "True"
    for name in ("layer", "bytes", "merge"):  # the same on every machine
        assert found[name] == printed(stored)[name]
    for name in ("questions", "train", "reload", "train-nf4"):
        assert ('{"country": "' in found[name]) == (name != "questions")
