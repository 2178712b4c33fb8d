"""The real server of ``arctic serve``: measured by ``arctic bench``; bad requests, a load above capacity, its end."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter

import httpx
import openai
import psutil
import pytest
import vllm.logger  # noqa: F401 - before output is captured, since it keeps the stream
from arctic_plugins_vllm.server import ENGINE_DIED

from arctic_plugins import host_version
from arctic_plugins.cli import main
from arctic_plugins.testing import tiny_llama

LENGTH = 512
"""Most tokens of a prompt and its response."""
BLOCKS, CONNECTIONS, QUEUE = 32, 50, 60


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(at, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{at}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def ready(server, at, log):
    until = time.monotonic() + 300
    while time.monotonic() < until and server.poll() is None:
        try:
            return ask(at, "/v1/models")["data"][0]["id"]
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def start(checkpoint, log, *options, **environment):
    """Start a server; give its process and port."""
    at = port()
    command = [sys.executable, "-m", "arctic_plugins.cli", "serve", str(checkpoint), "--host", "127.0.0.1"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(at), "--max-model-len", str(LENGTH), "--enforce-eager", *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **environment},
            start_new_session=True,
        )
    return process, at


def stop(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two of one model, started side by side: process, port and log of each.

    They work on ``BLOCKS`` requests at most, and refuse more than ``QUEUE`` unfinished ones, so that requests which are
    never forgotten show.
    """
    tmp_path = tmp_path_factory.mktemp("servers")
    checkpoint, started = tiny_llama(tmp_path / "a model, ünïcode"), []
    for name in ("stopped", "killed"):
        log = tmp_path / f"{name}.log"
        limits = ("--num-gpu-blocks-override", str(BLOCKS), "--max-num-queued-reqs", str(QUEUE))
        started.append((*start(checkpoint, log, *limits), log))
    yield started
    for process, _, _ in started:
        stop(process)


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
    ({"prompt": "x" * 600}, 400, "maximum context length is 512 tokens"),
    ({"prompt": [5] * 600}, 400, "maximum context length is 512 tokens"),
    ({"prompt": [5, 5000]}, 400, "5000"),
    ({"prompt": [-1]}, 400, "greater than or equal to 0"),
    ({"prompt": None}, 400, "prompt"),
    ({"max_tokens": 1000}, 400, "max_model_len=512"),
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
    ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "maximum context length is 512 tokens"),
    (b'{"prompt": "ab", ', 400, "JSON decode error"),
    (b'{"prompt": "\xff"}', 400, "error parsing the body"),
    (b"[" * 100_000, 400, "error parsing the body"),
    (b"3", 400, "valid dictionary"),
    (b"", 400, "Field required"),
]
"""A body, or fields of one that differ from a good one; the status, and what the message has to contain."""


def refusal(at, model, body):
    """Return the status and message of the answer to a completion, or chat, that is bad in one way."""
    path = "/v1/completions"
    if isinstance(body, dict):
        path = "/v1/chat/completions" if "messages" in body else path
        body = json.dumps({"model": model, "max_tokens": 2, **({} if "messages" in body else {"prompt": "ab"}), **body})
    request = urllib.request.Request(
        f"http://127.0.0.1:{at}{path}",
        body if isinstance(body, bytes) else body.encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        answer = json.load(error)
        return error.code, answer["error"]["message"] if "error" in answer else answer["detail"]


def unfinished(at):
    """Return the number of requests that the engine is working on, or will."""
    with urllib.request.urlopen(f"http://127.0.0.1:{at}/metrics", timeout=60) as response:
        found = re.findall(r"^vllm:num_requests_(?:running|waiting){.*} (\S+)$", response.read().decode(), re.MULTILINE)
    assert len(found) == 2
    return sum(map(float, found))


def memory(server):
    """Return the resident bytes of a server's processes."""
    process = psutil.Process(server.pid)
    return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)])


def client(at, connections=CONNECTIONS):
    limits = httpx.Limits(max_connections=connections)
    http = httpx.AsyncClient(limits=limits, trust_env=False)
    return openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{at}/v1", api_key="-", max_retries=0, timeout=300, http_client=http
    )


async def load(at, model, number):
    """Send ``number`` requests at once, of which every fourth leaves after its first token. Count what becomes of
    them.
    """

    async def ask_for(index, tokens, **options):
        return await openai_client.completions.create(
            model=model, prompt=[10 + index] * 16, max_tokens=tokens, extra_body={"ignore_eos": True}, **options
        )

    async def become(index):
        if index % 4:
            return (await ask_for(index, 8)).usage.completion_tokens
        async with await ask_for(index, 400, stream=True) as stream:
            await anext(aiter(stream))
        return "left"

    async with client(at) as openai_client:
        return Counter(await asyncio.gather(*map(become, range(number))))


async def streams(at, model, number, then):
    """Begin ``number`` streams, call ``then`` once each has its first token, and return how each ends."""
    waiting, begun = number, asyncio.Event()

    async def follow(index):
        nonlocal waiting
        reason, tokens = None, 0
        try:
            async with await openai_client.completions.create(
                model=model, prompt=[10 + index] * 8, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
            ) as stream:
                async for chunk in stream:
                    tokens += 1
                    reason = chunk.choices[0].finish_reason or reason
                    if tokens == 1:
                        waiting -= 1
                        if not waiting:
                            then()
                            begun.set()
                        await begun.wait()
        except (openai.APIError, httpx.HTTPError) as error:
            return type(error)
        return reason

    async with client(at) as openai_client, asyncio.timeout(120):
        return await asyncio.gather(*map(follow, range(number)))


def test_a_bad_request_is_refused_with_a_message(servers):
    server, at, log = servers[0]
    model = ready(server, at, log)
    wrong = []
    for body, status, part in MISTAKES:
        found, message = refusal(at, model, body)
        if found != status or part not in message:
            wrong.append((str(body)[:80], found, message[:200]))
    assert not wrong
    assert ask(at, "/v1/completions", {"model": model, "prompt": "ab", "max_tokens": 2})["choices"]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{at}/v1", api_key="-", max_retries=0) as ours:
        with pytest.raises(openai.NotFoundError, match="`other` does not exist"):
            ours.completions.create(model="other", prompt="ab")
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            ours.completions.create(model=model, prompt="x" * 600)
    assert unfinished(at) == 0


def test_a_load_above_capacity_leaves_nothing_behind(servers):
    server, at, log = servers[0]
    model = ready(server, at, log)
    sizes = []
    for _ in range(2):
        assert asyncio.run(load(at, model, 100)) == {"left": 25, 8: 75}
        until = time.monotonic() + 30
        while unfinished(at) and time.monotonic() < until:
            time.sleep(0.1)
        assert unfinished(at) == 0
        sizes.append(memory(server))
    assert sizes[1] - sizes[0] < 32 << 20


def test_they_are_compared(servers, capsys):
    urls = []
    for _, at, log in servers:
        ready(servers[len(urls)][0], at, log)
        urls.append(f"http://127.0.0.1:{at}")
    lengths = ["--prompt-length", "20", "--response-length", "6"]
    with pytest.raises(SystemExit) as raised:
        main(
            [
                "bench",
                "online",
                "--compare",
                *urls,
                "--rates",
                "inf",
                "--requests",
                "3",
                *lengths,
                "--rounds",
                "1",
                "--json",
            ]
        )
    output, error = capsys.readouterr()
    assert raised.value.code == 0, error
    result = json.loads(output)
    for target in result["targets"]:
        assert (target["server"], target["max_model_len"]) == (f"vLLM {host_version('vllm')[1]}", LENGTH)
    for found in result["loads"][0]["results"].values():
        assert (found["requests"], found["failed"], found["prompt_tokens"], found["response_tokens"]) == (3, 0, 60, 18)
        assert (found["counters"]["prefix_cache_queries"], found["counters"]["prefix_cache_hits"]) == (60, 0)


def test_a_supervisor_learns_how_the_server_ended(servers):
    (stopped, where, _), (killed, at, log) = servers
    models = [ready(*each[:2], each[2]) for each in servers]
    ends = asyncio.run(streams(where, models[0], 6, lambda: stopped.send_signal(signal.SIGTERM)))
    assert ends == ["length"] * 6
    assert stopped.wait(timeout=60) == 0
    [engine] = (
        child
        for child in psutil.Process(killed.pid).children(recursive=True)
        if "EngineCore" in " ".join(child.cmdline())
    )
    ends = asyncio.run(streams(at, models[1], 6, engine.kill))
    assert all(isinstance(end, type) for end in ends), ends
    assert killed.wait(timeout=30) == ENGINE_DIED, log.read_text()[-3000:]
    assert "arctic: vLLM's engine died" in log.read_text()


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_server(tmp_path):
    log = tmp_path / "log"
    options = ("--tensor-parallel-size", "2")
    server, at = start(tiny_llama(tmp_path / "model"), log, *options, VLLM_CPU_OMP_THREADS_BIND="nobind")
    try:
        model = ready(server, at, log)
        processes = psutil.Process(server.pid).children(recursive=True)
        worker = [process for process in processes if "Worker" in " ".join(process.cmdline())][-1]
        ends = asyncio.run(streams(at, model, 6, worker.kill))
        assert all(isinstance(end, type) for end in ends), ends
        assert server.wait(timeout=30) == ENGINE_DIED, log.read_text()[-3000:]
        psutil.wait_procs(processes, timeout=10)
        assert not [process for process in processes if process.is_running()]
    finally:
        stop(server)
