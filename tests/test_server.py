"""The real server of ``arctic serve``: `arctic bench` measures it, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest
import vllm.logger  # noqa: F401 - before output is captured, since it keeps the stream
from arctic_plugins_vllm.server import ENGINE_DIED

from arctic_plugins import host_version
from arctic_plugins.cli import main
from arctic_plugins.testing import tiny_llama


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


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two of one model, started side by side: process, port and log of each."""
    tmp_path = tmp_path_factory.mktemp("servers")
    checkpoint, started = tiny_llama(tmp_path / "a model, ünïcode"), []
    for name in ("stopped", "killed"):
        at, log = port(), tmp_path / f"{name}.log"
        command = [
            sys.executable,
            "-m",
            "arctic_plugins.cli",
            "serve",
            str(checkpoint),
            "--host",
            "127.0.0.1",
            "--port",
            str(at),
        ]
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, "--max-model-len", "64", "--enforce-eager"],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
                start_new_session=True,
            )
        started.append((process, at, log))
    yield started
    for process, _, _ in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


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
        assert (target["server"], target["max_model_len"]) == (f"vLLM {host_version('vllm')[1]}", 64)
    for found in result["loads"][0]["results"].values():
        assert (found["requests"], found["failed"], found["prompt_tokens"], found["response_tokens"]) == (3, 0, 60, 18)
        assert (found["counters"]["prefix_cache_queries"], found["counters"]["prefix_cache_hits"]) == (60, 0)


def test_a_supervisor_learns_how_the_server_ended(servers):
    (stopped, _, _), (killed, _, log) = servers
    for server, where, text in servers:
        model = ready(server, where, text)
        assert ask(where, "/v1/completions", {"model": model, "prompt": "ab", "max_tokens": 2})["choices"]
    stopped.send_signal(signal.SIGTERM)
    engine = next(
        child
        for child in psutil.Process(killed.pid).children(recursive=True)
        if "EngineCore" in " ".join(child.cmdline())
    )
    engine.kill()
    assert stopped.wait(timeout=120) == 0
    assert killed.wait(timeout=120) == ENGINE_DIED, log.read_text()[-3000:]
    assert "arctic: vLLM's engine died" in log.read_text()
