"""A server of `arctic serve` under more load than it can work on, and its end: by SIGTERM, and by a process that dies.

    python benchmarks/serving_load.py TRACE [--requests 1000] [--clients 200] [--prompt-length 200]
                                      [--response-length 26] [--rounds 3] [--json FILE]

The model is a tiny random Llama, so that nearly all of the time is the server's. TRACE is sent with `arctic bench
trace`, in the format that it reads; its requests get the given lengths. Memory is that of all processes of the server,
resident, after each round. Then --clients streams leave after their first token, and three servers end while 16 streams
are in flight, all with the client of OpenAI: seconds until the engine is idle, and until the process has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from arctic_plugins_vllm.running import Server

from arctic_plugins.testing import tiny_llama

MODEL = "model"
LENGTH = 4096
"""Most tokens of a prompt and its response."""
STREAMS, TOKENS = 16, 2000
"""The number of streams that an end interrupts, and of tokens that each asks for: seconds of work, on any machine."""


def processes(server: Server) -> list[psutil.Process]:
    """Return the processes of a server, the first of them first."""
    first = psutil.Process(server.process.pid)
    return [first, *first.children(recursive=True)]


def memory(server: Server) -> int:
    """Return the resident bytes of a server's processes."""
    return sum(process.memory_info().rss for process in processes(server))


def unfinished(server: Server) -> int:
    """Return the number of requests that the engine is working on, or will."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        text = response.read().decode()
    running, waiting = re.findall(r"^vllm:num_requests_(?:running|waiting){.*} (\S+)$", text, re.MULTILINE)
    return int(float(running) + float(waiting))


def idle(server: Server, timeout: float = 60) -> float:
    """Wait until no request is unfinished, and return the seconds that this took."""
    begun = time.monotonic()
    while unfinished(server):
        if time.monotonic() > begun + timeout:
            raise TimeoutError(f"{unfinished(server)} requests are unfinished after {timeout} s")
        time.sleep(0.05)
    return time.monotonic() - begun


def client(server: Server, connections: int) -> openai.AsyncOpenAI:
    """Return the client of OpenAI, which has so many connections at most, and never tries again."""
    http = httpx.AsyncClient(limits=httpx.Limits(max_connections=connections), trust_env=False)
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=600, http_client=http)


async def leave(server: Server, number: int, tokens: int, connections: int) -> None:
    """Begin ``number`` streams, and leave each after its first token."""

    async def glance(index: int) -> None:
        async with await asked.completions.create(
            model=MODEL, prompt=[10 + index % 200] * 16, max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            await anext(aiter(stream))

    async with client(server, connections) as asked:
        await asyncio.gather(*map(glance, range(number)))


async def streams(server: Server, number: int, tokens: int, first: int, then: Callable[[], Any]) -> Counter[str]:
    """Begin ``number`` streams, call ``then`` once ``first`` of them have a token, and count how they end.

    Returns:
        The reason for which a response is finished, "length" for a whole one, or the type of an error -> how many.
    """
    begun = 0

    async def follow(index: int) -> str:
        nonlocal begun
        reason = None
        try:
            async with await asked.completions.create(
                model=MODEL, prompt=[10 + index] * 8, max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
            ) as stream:
                async for chunk in stream:
                    if reason is None:
                        begun += 1
                        if begun == first:
                            then()
                    reason = chunk.choices[0].finish_reason or ""
        except (openai.APIError, httpx.HTTPError) as error:
            return type(error).__name__
        return str(reason)

    async with client(server, number) as asked, asyncio.timeout(300):
        return Counter(await asyncio.gather(*map(follow, range(number))))


def bench(server: Server, arguments: Sequence[Any]) -> dict[str, Any]:
    """Run `arctic bench trace`, and return the figures of its load."""
    command = [sys.executable, "-m", "arctic_plugins.cli", "bench", "trace", *map(str, arguments)]
    done = subprocess.run([*command, "--base-url", server.url, "--json"], stdout=subprocess.PIPE, check=False)
    (load,) = json.loads(done.stdout)["loads"]
    return dict(load["results"][""])


def end(server: Server, name: str | None, number: int = STREAMS, tokens: int = TOKENS) -> dict[str, Any]:
    """End a server while it streams: by SIGTERM once all streams have begun, or by killing its process called ``name``.

    A tiny model finishes all streams faster than the client reads them. So a process is killed once one has begun.
    """
    begun = 0.0
    target = processes(server)[0]
    if name is not None:
        target = next(process for process in processes(server) if name in " ".join(process.cmdline()))

    def then() -> None:
        nonlocal begun
        begun = time.monotonic()
        target.send_signal(signal.SIGTERM if name is None else signal.SIGKILL)

    ends = asyncio.run(streams(server, number, tokens, number if name is None else 1, then))
    status = server.process.wait(timeout=120)
    return {"streams": dict(ends), "status": status, "seconds": time.monotonic() - begun}


def main() -> None:
    """Run everything, and print it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--prompt-length", type=int, default=200)
    parser.add_argument("--response-length", type=int, default=26)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lengths = ["--prompt-length", args.prompt_length, "--response-length", args.response_length]
    load = [args.trace, "--requests", args.requests, "--clients", args.clients, *lengths]
    result: dict[str, Any] = {"rounds": [], "ends": {}}
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = tiny_llama(Path(directory) / "tiny", max_position_embeddings=LENGTH)
        served = [str(checkpoint), "--served-model-name", MODEL, "--max-model-len", str(LENGTH), "--enforce-eager"]
        with Server(served, Path(directory) / "log") as server:
            result["memory"] = memory(server)
            print(f"before: {result['memory'] / 2**20:.0f} MiB", flush=True)
            for number in range(args.rounds):
                figures = bench(server, [*load, "--seed", number])
                figures |= {"memory": memory(server), "unfinished": unfinished(server)}
                result["rounds"].append(figures)
                print(
                    f"round {number + 1}: {figures['requests']} requests, {figures['failed']} failed, at most "
                    f"{figures['most_in_flight']} in flight, {figures['requests_per_second']:.1f} req/s, "
                    f"{figures['tokens_per_second']:.0f} tok/s, TTFT {figures['ttft']['p50']:.2f} / "
                    f"{figures['ttft']['p99']:.2f} s, E2E {figures['e2e']['p50']:.2f} / {figures['e2e']['p99']:.2f} s, "
                    f"{figures['unfinished']} unfinished, {figures['memory'] / 2**20:.0f} MiB",
                    flush=True,
                )
            asyncio.run(leave(server, args.clients, TOKENS, args.clients))
            result["idle"] = idle(server)
            print(f"{args.clients} clients left: idle after {result['idle']:.2f} s", flush=True)
            result["ends"]["SIGTERM"] = end(server, None)
        print(f"SIGTERM: {result['ends']['SIGTERM']}", flush=True)
        for name in ("EngineCore", "Worker"):
            with Server(served, Path(directory) / "log") as server:
                result["ends"][name] = end(server, name)
            print(f"SIGKILL of the {name}: {result['ends'][name]}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
