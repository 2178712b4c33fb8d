"""Real servers of ``arctic serve``: ``arctic bench`` measures them, adapters, metrics, processes, and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress

import psutil
import pytest
import torch
import vllm.logger  # noqa: F401 - before output is captured, since it keeps the stream
from arctic_plugins_huggingface import load_model, save_checkpoint
from arctic_plugins_huggingface.checkpoints.load import load_checkpoint
from arctic_plugins_vllm.server import ENGINE_DIED

from arctic_plugins import Stack, host_version
from arctic_plugins.cli import main
from arctic_plugins.testing import draw_adapter, run_python, tiny_llama

PROMPT, TOKENS = list(range(10, 30)), 8
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def send(at, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{at}{path}", data, {"Content-Type": "application/json"})
    return NO_PROXY.open(request, timeout=120)


def ask(at, path, body=None):
    """Status and body of the answer."""
    try:
        with send(at, path, body) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def ready(server, at, log):
    until = time.monotonic() + 500
    while time.monotonic() < until and server.poll() is None:
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            return [model["id"] for model in json.loads(ask(at, "/v1/models")[1])["data"]]
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def greedy(at, model, tokens=TOKENS):
    sampling = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    status, answer = ask(at, "/v1/completions", {"model": model, "prompt": PROMPT, **sampling})
    assert status == 200, answer
    return json.loads(answer)["choices"][0]["token_ids"]


@torch.no_grad()
def reference(model):
    ids = list(PROMPT)
    for _ in range(TOKENS):
        ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, of two and of three layers, and adapters of both, of several ranks and encodings."""
    directory = tmp_path_factory.mktemp("served")
    plain, deep = tiny_llama(directory / "a model, ünïcode"), tiny_llama(directory / "deep", num_hidden_layers=3)
    fp8 = Stack.from_dict({"fp8": {}})
    base = save_checkpoint(*load_model(plain, fp8), directory / "base", fp8)
    kinds = {
        "one": (base, {"fp8": {}, "lora": {"r": 4}}, "lora_B"),
        "two": (base, {"fp8": {}, "lora": {"r": 16}}, "lora_A"),
        "later": (base, {"fp8": {}, "lora": {"r": 4}}, "lora_"),
        "plain": (plain, {"lora": {"r": 4}}, "lora_B"),
        "deeper": (deep, {"fp8": {}, "lora": {"r": 4}}, "lora_B"),
        "grouped": (plain, {"fp8": {"group_size": 64}, "lora": {"r": 4}}, "lora_B"),
    }
    for name, (model_of, plugins, part) in kinds.items():
        stack = Stack.from_dict(plugins)
        model, tokenizer = load_model(model_of, stack)
        draw_adapter(model, "lora_B")
        draw_adapter(model, part)
        save_checkpoint(model, tokenizer, directory / name, stack)
    return {"base": base, "unencoded": plain, **{name: directory / name for name in kinds}}


@pytest.fixture(scope="module")
def servers(models, tmp_path_factory, traced):
    """Two, started side by side, each with its port and log: one with adapters, and one of a plain model."""
    tmp_path, started = tmp_path_factory.mktemp("servers"), []
    adapters = [f"{name}={models[name]}" for name in ("one", "two")]
    arguments = {
        "stopped": [models["base"], *(word for adapter in adapters for word in ("--lora", adapter)), "--dtype=float32"],
        "killed": [models["unencoded"]],
    }
    for name, given in arguments.items():
        at, log = port(), tmp_path / f"{name}.log"
        options = ["--host", "127.0.0.1", "--port", at, "--max-model-len", 512, "--enforce-eager"]
        command = [sys.executable, "-m", "arctic_plugins.cli", "serve", *map(str, [*given, *options])]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        if name == "stopped":
            environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **traced[0]}
            environment["VLLM_CACHE_ROOT"] = str(tmp_path / "cache")  # so that vLLM inspects the model's class
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        started.append((process, at, log))
    yield started
    for process, _, _ in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def check_processes(pid, trace):
    """Every process of the server has registered the plugins by itself, and so did the one that inspects models."""
    spawned = [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if not any("resource_tracker" in word for word in child.cmdline())
    ]
    titles = [" ".join(child.cmdline()) for child in spawned]
    assert all(any(part in title for title in titles) for part in ("EngineCore", "Worker")), titles
    registered = {process["pid"] for process in trace if process["how"] == "register"}
    assert {pid, *(child.pid for child in spawned)} <= registered
    gone = [process for process in trace if process["pid"] not in {pid, *(child.pid for child in spawned)}]
    assert any("registry" in " ".join(process["command"]) for process in gone), gone


def check_adapters(at, models):
    """Each answers like transformers, those loaded later too; one that does not belong on the base is refused."""
    expected = {name: reference(load_checkpoint(models[name])[0]) for name in ("base", "one", "two", "later")}
    assert len(set(map(str, expected.values()))) == 4
    assert greedy(at, str(models["base"])) == expected["base"]
    assert [greedy(at, name) for name in ("one", "two")] == [expected["one"], expected["two"]]
    load = {"lora_name": "later", "lora_path": str(models["later"])}
    assert ask(at, "/v1/load_lora_adapter", load)[0] == 200
    assert greedy(at, "later") == expected["later"]
    assert ask(at, "/v1/unload_lora_adapter", {"lora_name": "later"})[0] == 200
    assert ask(at, "/v1/completions", {"model": "later", "prompt": PROMPT})[0] == 404
    for name, why in (("grouped", "was trained over weights encoded with"), ("deeper", "but .* has no such module")):
        status, answer = ask(at, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(models[name])})
        assert status == 400
        assert json.loads(answer)["error"]["type"] == "BadRequestError"
        with pytest.raises(AssertionError, match=why):
            raise AssertionError(answer)
        assert ask(at, "/v1/completions", {"model": name, "prompt": PROMPT})[0] == 404


def check_stops(server, at):
    """Asked to stop, it finishes what it has begun, and answers everything else with 503."""
    body = {"model": "one", "prompt": PROMPT, "max_tokens": 450, "n": 8, "ignore_eos": True, "stream": True}
    chunks, first = [], threading.Event()

    def read():
        with send(at, "/v1/completions", {**body, "return_token_ids": True}) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    chunks.append(json.loads(line[6:])["choices"][0])
                    first.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert first.wait(60)
    server.send_signal(signal.SIGTERM)
    refused = []
    while server.poll() is None:
        with suppress(urllib.error.URLError, ConnectionError):
            refused.append(ask(at, "/health")[0])
    reader.join()
    assert sum(len(chunk["token_ids"]) for chunk in chunks) == 8 * 450
    assert [chunk["finish_reason"] for chunk in chunks].count("length") == 8
    assert 503 in refused
    assert server.wait(timeout=60) == 0


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
        assert (target["server"], target["max_model_len"]) == (f"vLLM {host_version('vllm')[1]}", 512)
    for found in result["loads"][0]["results"].values():
        assert (found["requests"], found["failed"], found["prompt_tokens"], found["response_tokens"]) == (3, 0, 60, 18)
        assert (found["counters"]["prefix_cache_queries"], found["counters"]["prefix_cache_hits"]) == (60, 0)


def test_a_server_from_its_start_to_its_end(servers, models, traced):
    """Two servers, because starting one takes most of the time: both ends are tested, with everything in between."""
    (stopped, at, log), (killed, killed_at, killed_log) = servers
    assert ready(*servers[0]) == [str(models["base"]), "one", "two"]
    assert ask(at, "/health")[0] == 200
    check_processes(stopped.pid, traced[1]())
    check_adapters(at, models)
    metrics = ask(at, "/metrics")[1]
    assert f'arctic_plugins_info{{model_name="{models["base"]}",plugins="fp8==' in metrics
    assert ',stack="fp8",' in metrics
    written = log.read_text()
    assert written.count(f"{models['base']}: stack: fp8 ") == 1, written
    assert "; written by arctic-plugins " in written
    check_stops(stopped, at)

    (model,) = ready(*servers[1])
    assert len(greedy(killed_at, model)) == TOKENS
    assert f"{model}: stack: none; not written by arctic-plugins" in killed_log.read_text()
    with socket.create_connection(("127.0.0.1", killed_at)) as stuck:  # a client whose request never ends
        stuck.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        engine = next(
            child
            for child in psutil.Process(killed.pid).children(recursive=True)
            if "EngineCore" in " ".join(child.cmdline())
        )
        engine.kill()
        assert killed.wait(timeout=30) == ENGINE_DIED, killed_log.read_text()[-3000:]
    assert "arctic: vLLM's engine died" in killed_log.read_text()


ENDS = """
import asyncio, os, signal, sys, threading
from contextlib import asynccontextmanager
from arctic_plugins_vllm import ending

class Engine:
    errored = False

    def shutdown(self, timeout=None):  # that of an engine which is waiting for its requests
        print("stopping", flush=True)
        threading.Event().wait()

@asynccontextmanager
async def build():
    yield Engine()

async def serve():
    async with ending.ENDING.watched(build) as engine:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: loop.run_in_executor(None, engine.shutdown))
        print("ready", flush=True)
        await asyncio.sleep(60)

asyncio.run(serve())
"""


def test_a_second_signal_ends_the_server_at_once():
    with subprocess.Popen([sys.executable, "-c", ENDS], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        server.send_signal(signal.SIGTERM)
        assert server.stdout.readline() == "stopping\n"
        begun = time.monotonic()
        while server.poll() is None and time.monotonic() < begun + 30:
            server.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert server.wait(timeout=1) == 128 + signal.SIGTERM


def test_a_signal_ends_a_server_that_is_starting():
    starting = ENDS.replace(
        "    yield Engine()", '    print("starting", flush=True); import time; time.sleep(60); yield'
    )
    with subprocess.Popen([sys.executable, "-c", starting], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "starting\n"
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 128 + signal.SIGTERM


def test_a_client_that_does_not_leave_holds_up_neither_end():
    """Neither that of a dead engine, nor that of one that has stopped: the process ends after some seconds."""
    shorter = ENDS.replace("\nclass Engine", "\nending.GRACE = ending.WATCHDOG = 0.2\n\nclass Engine")
    dies = shorter.replace("    errored = False", "    errored = True")
    done = run_python("-c", dies, status=ENGINE_DIED)
    assert "arctic: vLLM's engine died" in done.stderr
    stops = shorter.replace("threading.Event().wait()", "pass").replace(
        'print("ready", flush=True)', "os.kill(os.getpid(), signal.SIGTERM)"
    )
    run_python("-c", stops, status=0)
