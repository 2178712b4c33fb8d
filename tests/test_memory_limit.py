"""A base that does not fit trains: under RLIMIT_DATA, in processes of their own, with the benchmark's child."""

import json
import resource
import sys
from pathlib import Path

import pytest
from arctic_plugins_huggingface import load_model, save_checkpoint

from arctic_plugins import Stack
from arctic_plugins.testing import run_python, tiny_llama

pytestmark = pytest.mark.slow
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "offload.py"
LIMIT = 1_250_000_000
"""Less than the base in bfloat16 (1,027 MB) and what Python and its libraries allocate (350 MB)."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The plain and the encoded checkpoint of a random Llama of 0.5B parameters."""
    folder = tmp_path_factory.mktemp("limit")
    sizes = {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    }
    plain = tiny_llama(folder / "plain", dtype="bfloat16", head_dim=128, vocab_size=32000, **sizes)
    stack = Stack.from_dict({"fp8": {}})
    return plain, save_checkpoint(*load_model(plain, stack), folder / "encoded", stack)


def train(checkpoint, plugins, limit=None, status=0):
    def bound():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    return run_python(
        BENCHMARK, "child", checkpoint, json.dumps(plugins), 8, 1, status=status, timeout=900, preexec_fn=bound
    )


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA and /proc are Linux's")
def test_where_bf16_dies_fp8_on_disk_trains(checkpoints, tmp_path):
    plain, encoded = checkpoints
    died = train(plain, {}, LIMIT, status=None)
    assert died.returncode != 0
    assert "emory" in died.stderr, died.stderr[-2000:]
    done = train(encoded, {"offload": {"to": "disk", "path": str(tmp_path)}}, LIMIT)
    free = train(encoded, {})
    assert json.loads(done.stdout.splitlines()[-1])["loss"] == json.loads(free.stdout.splitlines()[-1])["loss"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_what_leaves_is_not_in_memory(checkpoints, tmp_path, ratio):
    done = train(checkpoints[0], {"fp8": {}, "offload": {"to": "disk", "ratio": ratio, "path": str(tmp_path)}})
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["resident"] == pytest.approx((1 - ratio) * found["encoded"], abs=0.05 * found["encoded"])
