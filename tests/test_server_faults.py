"""A real server of ``arctic serve`` and the real client of OpenAI: bad requests, more requests than it can work on,
clients that leave, and the death of a worker.
"""

import asyncio
import json
import runpy
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import openai
import psutil
import pytest
from arctic_plugins_vllm.running import Server
from arctic_plugins_vllm.server import ENGINE_DIED

from arctic_plugins.testing import tiny_llama

BENCHMARK = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "serving_load.py"))
MODEL = BENCHMARK["MODEL"]
LENGTH = 8192
"""Most tokens of a prompt and its response."""
RUNNING, CONNECTIONS, QUEUE = 16, 50, 60


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One that works on at most ``RUNNING`` requests at a time, and refuses more than ``QUEUE`` unfinished ones: a
    request that is never forgotten shows.
    """
    directory = tmp_path_factory.mktemp("server")
    limits = ["--max-num-seqs", str(RUNNING), "--max-num-queued-reqs", str(QUEUE)]
    with served(directory, *limits) as started:
        yield started


def served(directory, *options):
    tiny_llama(directory / MODEL, max_position_embeddings=LENGTH)
    always = ["--served-model-name", MODEL, "--max-model-len", str(LENGTH), "--enforce-eager"]
    return Server([str(directory / MODEL), *always, *options], directory / "log")


UNSENDABLE = [
    {"stop": ["\ud800"]},
    {"bad_words": ["\ud800"]},
    {"request_id": "\ud800"},
    {"vllm_xargs": {"\ud800": 1}},
    {"top_k": 10**30},
    {"top_k": 10**30, "n": 2, "temperature": 1},
]
"""Fields of requests which vLLM 0.32's server answers with status 500, and never forgets."""
MISTAKES = [
    ({"model": "other"}, 404, "`other` does not exist"),
    ({"prompt": "x" * 9000}, 400, "maximum context length is 8192 tokens"),
    ({"prompt": [5] * 9000}, 400, "maximum context length is 8192 tokens"),
    ({"prompt": [5, 5000]}, 400, "5000"),
    ({"prompt": [-1]}, 400, "greater than or equal to 0"),
    ({"prompt": None}, 400, "prompt"),
    ({"max_tokens": 10_000}, 400, "max_model_len=8192"),
    ({"max_tokens": -1}, 400, "max_tokens must be at least 1"),
    ({"n": 0}, 400, "n must be at least 1"),
    ({"temperature": -1}, 400, "temperature must be non-negative"),
    ({"temperature": float("nan")}, 400, "temperature must be a finite number"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 2}, 400, "top_p must be in (0, 1]"),
    ({"logprobs": 10**6}, 400, "greater than max allowed: 20"),
    ({"logit_bias": {"5000": 1}}, 400, "out-of-vocab"),
    ({"structured_outputs": {"regex": "("}}, 400, "invalid regex"),
    ({"stream": True, "temperature": -1}, 400, "temperature must be non-negative"),
    *((fields, 400, "cannot be sent to the engine") for fields in UNSENDABLE * 3),
    ({"messages": []}, 400, "empty conversation"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "content"),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "maximum context length is 8192 tokens"),
    (b'{"prompt": "ab", ', 400, "JSON decode error"),
    (b'{"prompt": "\xff"}', 400, "error parsing the body"),
    (b"[" * 100_000, 400, "error parsing the body"),
    (b"3", 400, "valid dictionary"),
    (b"", 400, "Field required"),
]
"""A body, or fields of one that differ from a good one; the status, and what the message has to contain."""


def refusal(server, body):
    """Return the status and message of the answer to a completion, or chat, that is bad in one way."""
    path = "/v1/completions"
    if isinstance(body, dict):
        path = "/v1/chat/completions" if "messages" in body else path
        body = json.dumps({"model": MODEL, "max_tokens": 2, **({} if "messages" in body else {"prompt": "ab"}), **body})
    request = urllib.request.Request(
        f"{server.url}{path}",
        body if isinstance(body, bytes) else body.encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        answer = json.load(error)
        return error.code, answer["error"]["message"] if "error" in answer else answer["detail"]


async def load(server, number):
    """Send ``number`` requests at once, and as many that leave after their first token; count the tokens of answers."""

    async def ask(index):
        answer = await client.completions.create(
            model=MODEL, prompt=[10 + index] * 16, max_tokens=8, extra_body={"ignore_eos": True}
        )
        return answer.usage.completion_tokens

    async with BENCHMARK["client"](server, CONNECTIONS // 2) as client:
        leaving = BENCHMARK["leave"](server, number, 1000, CONNECTIONS // 2)
        return Counter((await asyncio.gather(leaving, *map(ask, range(number))))[1:])


def check_end(server, name):
    """Kill the worker called ``name`` while it works: every request gets an error, and the server ends."""
    processes = BENCHMARK["processes"](server)
    found = BENCHMARK["end"](server, name, number=2, tokens=8000)
    assert found["status"] == ENGINE_DIED, server.log.read_text()[-3000:]
    assert found["seconds"] < 30
    assert not found["streams"].keys() & {"length", "", "None"}  # whole answers, and those that just end
    assert not psutil.wait_procs(processes[1:], timeout=30)[1]


def test_a_bad_request_is_refused_with_a_message(server):
    wrong = []
    for body, status, part in MISTAKES:
        found, message = refusal(server, body)
        if found != status or part not in message:
            wrong.append((str(body)[:80], found, message[:200]))
    assert not wrong
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        assert client.completions.create(model=MODEL, prompt="ab", max_tokens=2).choices
        with pytest.raises(openai.NotFoundError, match="`other` does not exist"):
            client.completions.create(model="other", prompt="ab")
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.completions.create(model=MODEL, prompt="x" * 9000)
    BENCHMARK["idle"](server)


def test_a_load_above_capacity_leaves_nothing_behind(server):
    """The workers' memory is in docs/serving.md: it grows until there are kernels for every size of a batch."""
    sizes = []
    for _ in range(2):
        assert asyncio.run(load(server, 50)) == {8: 50}
        BENCHMARK["idle"](server)
        processes = BENCHMARK["processes"](server)
        sizes.append([process.memory_info().rss for process in processes if "Worker" not in process.cmdline()[0]])
    assert len(sizes[0]) >= 2  # the server and the engine
    assert all(after - before < 8 << 20 for before, after in zip(*sizes, strict=True))


def test_a_worker_that_dies_ends_the_server_and_every_request(server):
    check_end(server, "Worker")


@pytest.mark.slow
def test_one_of_two_workers_that_dies_ends_the_server_and_every_request(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with served(tmp_path, "--tensor-parallel-size", "2") as server:
        check_end(server, "Worker_TP1")
