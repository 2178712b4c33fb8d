"""`arctic bench` against small servers that answer, or fail, as they are told."""

import asyncio
import json
import os
import re
import signal
import stat
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import vllm.logger  # noqa: F401 - before output is captured, since it keeps the stream
from aiohttp import web
from arctic_plugins_vllm import running
from arctic_plugins_vllm.bench.client import LOOPBACK
from arctic_plugins_vllm.running import Server
from rich.console import Console

from arctic_plugins.cli import main
from arctic_plugins.errors import ArcticError

METRICS = """# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0"} %d
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0"} %d
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0"} 3
"""


class Fake:
    """An OpenAI-compatible server. ``fails`` gives, for the number of a request, how it fails, or None."""

    def __init__(self, root, *, limit=64, fails=lambda number: None, usage=True):
        self.root, self.limit, self.fails, self.usage = str(root), limit, fails, usage
        self.bodies, self.times, self.busy, self.most_busy, self.closing = [], [], 0, 0, False

    async def models(self, _):
        card = {"id": "model", "root": self.root, "max_model_len": self.limit}
        return web.json_response({"data": [card, {"id": "adapter", "parent": "model"}, "nonsense"]})

    async def version(self, _):
        return web.json_response({"version": "1.2.3"})

    async def metrics(self, _):
        return web.Response(text=METRICS % (4 * len(self.bodies), len(self.bodies)))

    async def completions(self, request):
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        self.times.append(time.monotonic())
        self.busy += 1
        self.most_busy = max(self.busy, self.most_busy)
        try:
            return await self.answer(request, body, self.fails(number))
        finally:
            self.busy -= 1

    async def answer(self, request, body, failure):
        if failure == "refuse":
            return web.json_response({"error": {"message": "too\nlong", "code": 400}}, status=400)
        if failure == "html":
            return web.Response(text="<h1>Bad gateway</h1>", status=502)
        if failure == "hang":
            while not self.closing:
                await asyncio.sleep(0.01)
        response = web.StreamResponse()
        await response.prepare(request)
        for token in range(body["max_tokens"]):
            if failure in ("cut", "error", "short") and token == 2:
                break
            await self.send(response, {"choices": [{"text": "a"}]})
            await asyncio.sleep(0.001)
        if failure == "cut":
            request.transport.abort()
            return response
        if failure == "error":
            await self.send(response, {"error": {"message": "the engine died"}})
        elif self.usage:
            tokens = 2 if failure == "short" else body["max_tokens"]
            await self.send(
                response, {"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}}
            )
        await response.write(b"data: [DONE]\n\n")
        return response

    async def send(self, response, content):
        await response.write(f"data: {json.dumps(content)}\n\n".encode())


@contextmanager
def serve(fake):
    """Run ``fake`` in a thread; gives its URL."""
    app = web.Application()
    app.router.add_get("/v1/models", fake.models)
    app.router.add_get("/version", fake.version)
    app.router.add_get("/metrics", fake.metrics)
    app.router.add_post("/v1/completions", fake.completions)
    loop, ports = asyncio.new_event_loop(), []
    runner = web.AppRunner(app, shutdown_timeout=0)
    ready = threading.Event()

    async def start():
        await runner.setup()
        await (site := web.TCPSite(runner, LOOPBACK[0], 0)).start()
        ports.append(site._server.sockets[0].getsockname()[1])
        ready.set()

    def run():
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        fake.closing = True
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


@pytest.fixture
def fake(tiny_checkpoint):
    return Fake(tiny_checkpoint)


@pytest.fixture
def bench(capsys):
    """A function that runs the command in this process and gives (exit status, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as raised:
            main(["bench", *map(str, arguments)])
        return raised.value.code, *capsys.readouterr()

    return run


BATCH = ("batch", "--sizes", "1,3", "--prompt-lengths", "8", "--response-length", "5")
ONLINE = ("online", "--rates", "inf", "--requests", "6", "--prompt-length", "8", "--response-length", "5")
WARM = 1
"""Requests before the first that is measured, for one load."""


def test_every_request_is_as_asked_and_every_token_counted(bench, fake):
    with serve(fake) as url:
        status, output, error = bench(*BATCH, "--base-url", f"{url}/v1", "--json")
    assert status == 0, error
    result = json.loads(output)
    assert len(fake.bodies) == 2 * WARM + 1 + 3
    for body in fake.bodies:
        assert (body["model"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == ("model", 5, True, 0)
        assert len(body["prompt"]) == 8
    assert len({tuple(body["prompt"]) for body in fake.bodies}) == 6, "no prompt is sent twice"
    assert fake.most_busy == 3
    assert [load["name"] for load in result["loads"]] == ["1 x 8", "3 x 8"]
    found = result["loads"][1]["results"][""]
    assert (found["requests"], found["failed"], found["prompt_tokens"], found["response_tokens"]) == (3, 0, 24, 15)
    assert found["most_in_flight"] == 3
    assert found["counters"]["draft_tokens"] == 12
    assert found["counters"]["accepted_tokens"] == 3
    [target] = result["targets"]
    assert (target["server"], target["model"], target["max_model_len"]) == ("vLLM 1.2.3", "model", 64)
    assert result["machine"]["processor"]
    assert result["versions"]["arctic-plugins-vllm"]
    assert result["notes"] == []


def test_the_table_shows_each_load(bench, fake):
    with serve(fake) as url:
        status, output, _ = bench(*BATCH, "--base-url", url)
    assert status == 0
    assert re.search(r"^1 x 8 +1 ", output, re.MULTILINE)
    assert re.search(r"^3 x 8 +3 ", output, re.MULTILINE)
    assert "3 x 8: 25% of 12 drafted tokens accepted" in output
    assert max(map(len, output.splitlines())) <= 80


def test_prompts_depend_on_the_seed_alone_and_have_no_special_tokens(bench, fake, tiny_checkpoint):
    from transformers import AutoTokenizer

    prompts = []
    with serve(fake) as url:
        for seed in ("1", "1", "2"):
            fake.bodies.clear()
            assert bench(*ONLINE, "--base-url", url, "--seed", seed, "--clients", "1")[0] == 0
            prompts.append([body["prompt"] for body in fake.bodies])
    assert prompts[0] == prompts[1] != prompts[2]
    used = {token for prompt in prompts for part in prompt for token in part}
    assert not used & set(AutoTokenizer.from_pretrained(tiny_checkpoint).all_special_ids)
    assert len(used) > 50


def test_clients_limit_the_requests_in_flight(bench, fake):
    with serve(fake) as url:
        status, output, _ = bench(*ONLINE, "--base-url", url, "--clients", "2", "--json")
    assert status == 0
    assert fake.most_busy == 2
    assert json.loads(output)["loads"][0]["results"][""]["most_in_flight"] == 2


def test_a_trace_is_sent_with_its_lengths(bench, fake, tmp_path):
    queries = [{"prompt_length": 5, "response_length": 2}, {"prompt_length": 9, "response_length": 3}]
    lines = [{"timestamp": time, "queries": queries} for time in (100, 140, 300)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with serve(fake) as url:
        status, output, error = bench("trace", tmp_path / "my.jsonl", "--base-url", url, "--requests", 4, "--json")
    assert status == 0, error
    assert [(len(body["prompt"]), body["max_tokens"]) for body in fake.bodies[WARM:]] == [(5, 2), (9, 3)] * 2
    assert json.loads(output)["loads"][0]["arrivals_span"] == pytest.approx(0.04)
    assert fake.times[WARM + 2] - fake.times[WARM + 1] > 0.02, "no earlier than in the trace"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("refuse", "HTTP 400: too long"),
        ("html", "HTTP 502: <h1>Bad gateway</h1>"),
        ("cut", "ClientPayloadError: "),
        ("error", "the response ended after 2 of 5 tokens"),
        ("short", "the response ended after 2 of 5 tokens"),
        ("hang", "TimeoutError"),
    ],
)
def test_failed_requests_are_counted_and_end_with_status_1(bench, fake, failure, message):
    fake.fails = lambda number: failure if number in (WARM + 1, WARM + 4) else None
    with serve(fake) as url:
        status, output, error = bench(*ONLINE, "--base-url", url, "--timeout", "3")
    assert status == 1
    assert f"arctic: 2 of 6 requests failed; the first, of 'inf req/s': {message}" in error.splitlines()[-1]
    assert "4/6" in output, "what succeeded is reported nevertheless"


def test_all_may_fail(bench, fake, tmp_path):
    fake.fails = lambda number: "refuse" if number >= WARM else None
    with serve(fake) as url:
        status, output, error = bench(*ONLINE, "--base-url", url, "--out", tmp_path / "out")
    assert status == 1
    assert "6 of 6 requests failed" in error
    assert "0/6" in output
    assert "6 failed" in (tmp_path / "out" / "report.html").read_text()


def test_a_server_that_fails_cannot_be_compared(bench, fake, tiny_checkpoint, tmp_path):
    other = Fake(tiny_checkpoint, fails=lambda number: "refuse" if number >= WARM else None)
    with serve(fake) as first, serve(other) as second:
        status, output, error = bench(*ONLINE, "--compare", first, second, "--rounds", 4, "--out", tmp_path / "out")
    assert status == 1
    assert "24 of 48 requests failed; the first, of 'inf req/s' on B: HTTP 400: too long" in error
    assert re.search(r"TTFT p50 +- +-", output)
    assert "Ratios B / A" not in re.findall(
        "<figcaption>(.*?)</figcaption>", (tmp_path / "out/report.html").read_text()
    )


def test_every_stream_may_end_with_an_error(bench, fake):
    fake.fails = lambda number: "error" if number >= WARM else None
    with serve(fake) as url:
        status, _, error = bench(*ONLINE, "--base-url", url)
    assert status == 1
    assert "6 of 6 requests failed; the first, of 'inf req/s': the response ended after 2 of 5 tokens" in error


def test_without_ignore_eos_a_response_may_end_earlier_but_not_with_an_error(bench, fake):
    fake.fails = lambda number: {WARM: "short", WARM + 1: "error"}.get(number)
    with serve(fake) as url:
        status, _, error = bench(*ONLINE, "--base-url", url, "--no-ignore-eos")
    assert "ignore_eos" not in fake.bodies[0]
    assert status == 1
    assert "1 of 6 requests failed" in error


def test_from_a_server_that_reports_no_usage_chunks_are_counted(bench, tiny_checkpoint):
    fake = Fake(tiny_checkpoint, usage=False)
    with serve(fake) as url:
        status, output, _ = bench(*ONLINE, "--base-url", url, "--json")
    assert status == 0
    assert json.loads(output)["loads"][0]["results"][""]["response_tokens"] == 30


def test_what_cannot_work_is_refused_before_anything_is_measured(bench, fake, tmp_path, tiny_checkpoint):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with serve(fake) as url:
        cases = [
            (
                (*BATCH, "--base-url", url, "--model", "modell"),
                "does not serve the model 'modell'; did you mean 'model'?",
            ),
            ((*BATCH, "--base-url", f"{url}/nowhere"), "answers HTTP 404: 404: Not Found"),
            ((*BATCH, "--base-url", url, "--tokenizer", tmp_path), f"the tokenizer {tmp_path} cannot be loaded"),
            ((*BATCH, "--base-url", url, "--out", tmp_path / "full"), "exists and is not empty"),
            (
                ("batch", "--base-url", url, "--prompt-lengths", "8,70"),
                "1 of 1 requests of '1 x 8' exceed the model's 64",
            ),
        ]
        for arguments, message in cases:
            status, output, error = bench(*arguments)
            assert (status, output) == (2, ""), arguments
            assert message in error
            assert len(error.splitlines()) == 1, error
        assert fake.bodies == []
        fake.root = "elsewhere/model"
        status, _, error = bench(*BATCH, "--base-url", url)
        assert (status, "set --tokenizer to a directory or Hub id" in error) == (2, True), (
            "no Hub id that a server names"
        )
        assert bench(*BATCH, "--base-url", url, "--tokenizer", tiny_checkpoint)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Usage"),
        (("batch",), "no server is named; expected CHECKPOINT, --base-url URL or --compare A B"),
        (("batch", "--no-such", "1"), "found --no-such in place of CHECKPOINT"),
        (("batch", "x", "--port", "1"), "found --port, but the server gets a free port"),
        (("batch", "x", "--base-url", "http://host"), "found --base-url and x"),
        (("batch", "x", "--compare", "a", "b"), "found --compare and another server"),
        (("batch", "--compare", "a", "--seed 1"), "'--seed 1' names no server"),
        (("batch", "--compare", "a", "'"), "cannot be split into arguments"),
        (("batch", "--compare", "http://a", "http://b", "--no-such"), "found --no-such, but no server is started"),
        (("batch", "--base-url", "here"), "'here' is not the URL of a server"),
        (("batch", "--base-url", "http://127.0.0.1:1"), "http://127.0.0.1:1/v1/models cannot be reached"),
        (("batch", "x", "--sizes", "1,0"), "'1,0' is not a list of positive numbers"),
        (("batch", "x", "--sizes", "4,4"), "contains a number twice"),
        (("batch", "x", "--sizes", "10000000"), "found a size of 10000000"),
        (("online", "x", "--rates", "nan"), "'nan' is not a list of positive numbers"),
        (("online", "x", "--rates", "1e-9"), "would arrive after"),
        (("online", "x", "--requests", "0"), "0 is not in the range"),
        (("online", "x", "--clients", "0"), "0 is not in the range"),
        (("online", "x", "--timeout", "nan"), "nan is not a number"),
        (("online", "x", "--extra-body", "[]"), "'[]' is not a JSON object"),
        (("trace", "nowhere.jsonl", "x"), "there is no trace nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line(bench, arguments, message):
    status, output, error = bench(*arguments)
    if not arguments:
        assert message in output + error
        return
    assert status == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_what_a_first_request_meets_ends_the_run(bench, fake):
    fake.fails = lambda number: "refuse"
    with serve(fake) as url:
        status, output, error = bench(*BATCH, "--base-url", url)
    assert (status, output, len(fake.bodies)) == (1, "", 1)
    assert "the first request of '1 x 8' failed: HTTP 400: too long" in error


def test_two_servers_get_the_same_requests_in_turns(bench, fake, tiny_checkpoint, tmp_path):
    other = Fake(tiny_checkpoint)
    with serve(fake) as first, serve(other) as second:
        status, output, error = bench(*ONLINE, "--compare", first, second, "--rounds", 4, "--out", tmp_path / "out")
    assert status == 0, error
    assert len(fake.bodies) == WARM + 4 * 6
    assert sorted(body["prompt"] for body in fake.bodies) == sorted(body["prompt"] for body in other.bodies)
    order = sorted([(when, "A") for when in fake.times[WARM:]] + [(when, "B") for when in other.times[WARM:]])
    assert "".join(name for _, name in order[::6]) == "ABBAABBA"
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [target["name"] for target in result["targets"]] == ["A", "B"]
    for found in result["loads"][0]["ratios"].values():
        assert found["low"] < found["ratio"] < found["high"]
    assert "ratios B / A over 4 rounds" in output


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_ends_the_run_with_requests_in_flight(bench, fake, number, expected):
    def fails(request):
        if request == WARM + 3:
            os.kill(os.getpid(), number)
        return "hang" if request >= WARM else None

    fake.fails = fails
    before = signal.getsignal(signal.SIGTERM)
    with serve(fake) as url:
        status, output, error = bench(*ONLINE, "--base-url", url)
    assert (status, output) == (expected, "")
    assert "Traceback" not in error
    assert signal.getsignal(signal.SIGTERM) == before


FETCHED = re.compile(
    r"""(?:src|href|action|data|poster)\s*=\s*["']?+(?!#)|url\(\s*["']?+(?!#)|@import|<script|<link|<iframe"""
)


def test_the_page_contains_everything_it_shows(bench, fake, tmp_path):
    fake.root = str(fake.root)
    with serve(fake) as url:
        status, _, error = bench(
            *BATCH, "--base-url", url, "--out", tmp_path / "new" / "out", "--extra-body", '{"user": "<script>"}'
        )
    assert status == 0, error
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "requests.jsonl", "result.json"]
    text = (out / "report.html").read_text()
    assert not FETCHED.search(text), FETCHED.search(text)
    assert text.count("<svg") == 6
    assert "&lt;script&gt;" in text
    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert [(line["load"], line["response_tokens"], len(line["itl"])) for line in lines] == [
        ("1 x 8", 5, 4),
        *[("3 x 8", 5, 4)] * 3,
    ]
    result = json.loads((out / "result.json").read_text())
    first = lines[0]["latency"]
    assert result["loads"][0]["results"][""]["e2e"]["p99"] == pytest.approx(first)
    assert np.isfinite(first)


STUB = """#!{python}
import http.server, os, signal, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
print("arguments", *sys.argv[4:-4], flush=True)
if "die" in sys.argv:
    print("the model [is] broken", flush=True)
    sys.exit(3)
def stop(*_):
    print("stopped", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else stop)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if "mortal" in sys.argv and self.path != "/health":
            print("arctic: out of memory\\n - leaked function", flush=True)
            os._exit(4)
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """In place of Python: a small server, whatever module it is told to run."""
    path = tmp_path / "stub"
    path.write_text(STUB.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(running.sys, "executable", str(path))
    return tmp_path / "log"


def test_a_server_ends_with_its_block(stub):
    def interrupted():
        with Server(["model", "--seed", "1"], stub) as server:
            processes.append(psutil.Process(server._process.pid))
            raise KeyboardInterrupt

    processes = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not processes[0].is_running()
    lines = stub.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("arguments model --seed 1", "stopped")


def test_a_server_that_dies_says_so(bench, stub, tiny_checkpoint):
    """It is healthy, answers nothing else, and ends when it is asked for its models."""
    status, output, error = bench(*BATCH, tiny_checkpoint, "mortal")
    assert (status, output) == (1, "")
    assert "arctic: the server ended with status 4: arctic: out of memory; see " in error.splitlines()[-1]


def test_a_server_that_does_not_stop_is_killed(stub, monkeypatch):
    monkeypatch.setattr(running, "PATIENCE", 0.5)
    with Server(["stubborn"], stub) as server:
        process = server._process
    assert process.returncode == -signal.SIGKILL


def test_a_server_that_does_not_start_shows_why(stub, capsys):
    with (
        pytest.raises(ArcticError, match=r"the server ended with status 3: the model \[is\] broken; see .*log"),
        Server(["die"], stub, console=Console(stderr=True)),
    ):
        pass
    assert "the model [is] broken" in capsys.readouterr().err
