"""``benchmarks/gpu.py`` without a GPU: every section with tiny shapes, and what becomes of failures."""

import json
import sys
from pathlib import Path

import pytest

from arctic_plugins.frozen import FrozenModule

FIGURE = {"name": "speed", "text": "1 s", "target": "", "met": None}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


def test_every_section_runs_with_tiny_shapes_on_a_cpu(tmp_path, capsys):
    import gpu

    path = tmp_path / "out" / "gpu.json"
    sections = [name for name in gpu.BUDGETS if name != "tests"]
    options = ["--device", "cpu", "--small", "--time", "9999", "--sections", ",".join(sections)]
    assert gpu.main([*options, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert {name: (entry["status"], entry["why"]) for name, entry in found["sections"].items()} == dict.fromkeys(
        sections, ("done", "")
    )
    figures = {name: {each["name"]: each for each in entry["figures"]} for name, entry in found["sections"].items()}
    errors = figures["kernels"]["96 x 64 fp6, relative error"]["errors"]
    assert errors.keys() == {"forward 1", "gradient 1", "forward 16", "gradient 16"}
    assert all(0 < error < 6e-3 for error in errors.values())
    assert 0.4 < next(figure for figure in figures["headline"].values() if "moved_share" in figure)["moved_share"] < 0.6
    assert "not counted on a CPU" in figures["step"]["fp8: memory as planned"]["text"]
    assert all(figure["met"] is None for of_section in figures.values() for figure in of_section.values())
    printed = capsys.readouterr().out
    assert all(figure["text"] in printed for of_section in figures.values() for figure in of_section.values())


def test_figures_outlive_a_section_that_fails(tmp_path, monkeypatch, capsys):
    import gpu
    import gpu_sections

    def breaks(bench):
        bench.figure("speed", "1 s")
        raise RuntimeError("no memory")

    monkeypatch.setitem(gpu_sections.SECTIONS, "step", breaks)
    monkeypatch.setitem(gpu_sections.SECTIONS, "mixture", lambda bench: bench.figure("size", "1 m"))
    options = ["--device", "cpu", "--sections", "step,mixture", "--json", str(tmp_path / "gpu.json")]
    assert gpu.main(options) == 1
    step, mixture = json.loads((tmp_path / "gpu.json").read_text())["sections"].values()
    assert (step["status"], step["why"], step["figures"]) == ("failed", "RuntimeError: no memory", [FIGURE])
    assert mixture["status"] == "done"
    assert "no memory" in capsys.readouterr().out
    assert gpu.main([*options, "--time", "0"]) == 0
    assert "no time was left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("then", "seconds", "status", "why"),
    [
        ("", 60, "done", ""),
        ("import time; time.sleep(600)", 0.5, "out of time", "ended after"),
        ("raise SystemExit('no kernel image')", 60, "failed", "exit status 1: no kernel image"),
        ("import os; os.abort()", 60, "failed", "exit status -6"),
        ("import subprocess; subprocess.Popen(['sleep', '600']); os.abort()", 0.5, "out of time", "ended after"),
    ],
)
def test_a_section_in_a_process_of_its_own(tmp_path, then, seconds, status, why):
    import gpu

    figures = []
    line = gpu.MARK + json.dumps(FIGURE)
    program = f"import os; print('loading'); print({line!r}, flush=True); {then}"
    log = tmp_path / "section.log"
    found, explained = gpu.watch([sys.executable, "-S", "-c", program], seconds, figures.append, log)
    assert (found, figures) == (status, [FIGURE])
    assert log.read_text().startswith(f"loading\n{line}\n")
    assert explained.startswith(why)


def test_the_tests_for_gpus_are_found_by_collection(tmp_path, monkeypatch):
    import gpu_sections

    mark = "import pytest\n\n@pytest.mark.gpu\ndef test_one():\n    assert {}\n\ndef test_other():\n    assert False\n"
    for name, content in {
        "a/tests/test_good.py": mark.format("True"),
        "b/tests/test_bad.py": mark.format("1 == 2"),
        "c/tests/test_unrelated.py": "import a_library_that_is_not_here",
        "d/tests/test_broken.py": "import a_library_that_is_not_here\n" + mark.format("True"),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(gpu_sections, "ROOT", tmp_path)
    figures = []
    with pytest.raises(RuntimeError, match="2 tests failed"):
        gpu_sections.tests(gpu_sections.Bench("cuda", False, 80, float("inf"), figures.append))
    broken, bad, counts = figures
    assert (bad["name"], bad["text"]) == ("b/tests/test_bad.py::test_one", "failed: assert 1 == 2")
    assert "No module named 'a_library_that_is_not_here'" in broken["text"]
    assert broken["name"] == "d/tests/test_broken.py"
    assert (counts["text"], counts["met"]) == ("1 passed, 2 failed", False)
    figures.clear()
    (tmp_path / "d/tests/test_broken.py").unlink()
    gpu_sections.tests(gpu_sections.Bench("cuda", False, 80, 0, figures.append))
    assert [(figure["text"], figure["met"]) for figure in figures] == [("2 not run", False)]


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("plugins", [{}, {"fp8": {}, "lora": {"r": 4}}, {"fp8": {"bits": 6, "group_size": 128}}])
def test_a_random_model_takes_the_bytes_that_are_planned(tmp_path, model_type, plugins):
    from arctic_plugins_huggingface import load_model
    from arctic_plugins_huggingface.training.memory import plan_memory
    from gpu_models import plan_random
    from gpu_sections import MIXTRAL, SMALL

    plan = plan_random(tmp_path / "model", model_type, {**MIXTRAL, **SMALL}, plugins, "cpu")
    planned = plan_memory(plan, "adamw_torch_fused")[1]
    model, _ = load_model(plan)
    total = sum(parameter.nbytes for parameter in model.parameters())
    if "lora" in plugins:
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        assert planned["optimizer"] == 2 * planned["trainable"] == 2 * trained
        total -= trained
    assert total == planned["base"]
    assert any(isinstance(module, FrozenModule) for module in model.modules()) == bool(plugins)


def test_no_more_is_offloaded_than_does_not_fit():
    from gpu_sections import LLAMA_70B, least_offload, working_bytes

    assert least_offload(100, kept=20, encoded=50, working=30, staging=4) is None
    assert least_offload(99, kept=20, encoded=50, working=30, staging=4) == 45
    assert least_offload(40, kept=20, encoded=50, working=30, staging=4) == 0
    assert working_bytes(LLAMA_70B, 2048, 0) < working_bytes(LLAMA_70B, 4096, 0) < 20e9


def test_the_share_of_copies_under_kernels():
    from gpu_models import share_under

    def event(category, name, begin, end):
        return {"cat": category, "name": name, "ts": begin, "dur": end - begin}

    kernels = [event("kernel", "k", *span) for span in ((0, 10), (8, 20), (30, 40), (100, 110))]
    other = [
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 0, 50),
        event("cpu_op", "aten::mm", 0, 99),
        {"ph": "M"},
    ]
    assert share_under([*kernels, *other]) is None
    copies = [event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", *span) for span in ((15, 35), (50, 60), (105, 115))]
    assert share_under([*copies, *other, *kernels]) == pytest.approx((5 + 5 + 0 + 5) / 40)
