"""Sends loads to a server and records what becomes of each request.

Single requests are sent and timed by the function of ``vllm bench serve`` (:func:`arctic_plugins_vllm.compat.ask`). Its
loop around them is not used: it prints, shows an error's HTTP reason without its message, and draws from numpy's global
generator.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from arctic_plugins.errors import ArcticError, CheckpointError, ConfigError, suggest
from arctic_plugins.provenance import read_provenance
from arctic_plugins_vllm.bench.loads import Load, Request
from arctic_plugins_vllm.bench.summary import Measurement, Record
from arctic_plugins_vllm.bench.urls import without_password

__all__ = ["Sampling", "Target", "connect", "measure", "measure_all"]

COUNTERS = {
    "vllm:prefix_cache_queries_total": "prefix_cache_queries",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits",
    "vllm:spec_decode_num_drafts_total": "drafts",
    "vllm:spec_decode_num_draft_tokens_total": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted_tokens",
}
"""Counters of vLLM 0.32's ``/metrics`` that are recorded, all in tokens except drafts."""
LONGEST_ANSWER = 1 << 16
"""Maximum number of bytes read of an error's body."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Refused(Exception):  # noqa: N818 - the server's word, shown as such
    """The message of a response whose status is not 200."""


@dataclass(frozen=True)
class Sampling:
    """What all requests have in common.

    Attributes:
        ignore_eos: whether responses have exactly the requested length.
        extra_body: more fields of a request.
        timeout: seconds until a request has failed.
    """

    ignore_eos: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})
    timeout: float = 600


@dataclass(frozen=True)
class Target:
    """A server and one of its models.

    Attributes:
        name: as it is shown.
        url: without ``/v1``.
        model: the model's name.
        tokens: ids that prompts consist of.
        limit: most tokens of a prompt and its response; None if the server does not tell.
        about: what the server tells about itself, with JSON types.
    """

    name: str
    url: str
    model: str
    tokens: np.ndarray
    limit: int | None
    about: Mapping[str, Any]


@contextlib.asynccontextmanager
async def _session(url: str, timeout: float) -> AsyncIterator[aiohttp.ClientSession]:
    async def refuse(response: aiohttp.ClientResponse) -> None:
        if response.status >= 400:
            body = (await response.content.read(LONGEST_ANSWER)).decode(errors="replace")
            raise Refused(f"HTTP {response.status}: {_message(body) or response.reason}")

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),  # the load limits the number of connections, nothing else does
        timeout=aiohttp.ClientTimeout(total=timeout),
        raise_for_status=refuse,
        trust_env=urlsplit(url).hostname not in LOOPBACK,
        headers=_authorization(),
    ) as session:
        yield session


def _authorization() -> dict[str, str]:
    """Return the header that OpenAI's clients send if ``OPENAI_API_KEY`` is set; vLLM's function does the same."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _message(body: str) -> str:
    """Return the message in the body of an error, as OpenAI, vLLM and FastAPI write it, in one line."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return " ".join(body.split())[:300]
    error = content.get("error", content) if isinstance(content, dict) else content
    found = error.get("message", error.get("detail", error)) if isinstance(error, dict) else error
    return " ".join(str(found).split())[:300]


async def connect(
    name: str, url: str, *, model: str | None = None, tokenizer: str | None = None, started: bool = False
) -> Target:
    """Ask a server what it serves.

    Args:
        name: of the target.
        url: result of :func:`~arctic_plugins_vllm.bench.urls.base_url`.
        model: one of the server's models; by default its first.
        tokenizer: directory or Hub id; by default the model's directory, as vLLM tells it, if it is on this machine.
        started: whether this process started the server. Only then is a Hub id that the server tells loaded.

    Raises:
        ConfigError: the server cannot be reached, does not have the model or is not OpenAI-compatible, or the tokenizer
            is not known or cannot be loaded.
    """
    async with _session(url, timeout=30) as session:
        models = _cards(await _get(session, f"{url}/v1/models"), url)
        try:
            version = (await _get(session, f"{url}/version")).get("version")
        except (ConfigError, AttributeError):  # only vLLM has it
            version = None
    if model is not None and model not in models:
        raise ConfigError(f"{without_password(url)} does not serve the model '{model}'", fix=suggest(model, models))
    model = model or next(iter(models))
    root = models[model].get("root")
    limit = models[model].get("max_model_len")
    about = {
        "url": without_password(url),
        "server": f"vLLM {version}" if isinstance(version, str) else None,
        "model": model,
        "max_model_len": limit if type(limit) is int and limit > 0 else None,
        **_provenance(root),
    }
    parent = models.get(str(models[model].get("parent")), {}).get("root")
    found = tokenizer or _tokenizer([root, parent], started=started)
    if found is None:
        raise ConfigError(
            f"{without_password(url)} does not tell where the tokenizer of '{model}' is on this machine",
            fix="set --tokenizer to a directory or Hub id",
        )
    return Target(name, url, model, await asyncio.to_thread(_tokens, found), about["max_model_len"], about)


async def _get(session: aiohttp.ClientSession, address: str) -> Any:
    shown = without_password(address)
    try:
        async with session.get(address) as response:
            return json.loads(await response.text())
    except Refused as error:
        raise ConfigError(
            f"{shown} answers {error}", fix="is it an OpenAI-compatible server? OPENAI_API_KEY sets its key"
        ) from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ConfigError(
            f"{shown} cannot be reached: {error or type(error).__name__}", fix="correct the URL"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shown} does not answer in JSON", expected="an OpenAI-compatible server") from error


def _cards(answer: Any, url: str) -> dict[str, dict[str, Any]]:
    """Return the models of an answer to ``/v1/models``, by name."""
    data = answer.get("data") if isinstance(answer, dict) else None
    cards = [card for card in data if isinstance(card, dict)] if isinstance(data, list) else []
    models = {card["id"]: card for card in cards if isinstance(card.get("id"), str)}
    if not models:
        raise ConfigError(f"{without_password(url)}/v1/models names no model", expected="an OpenAI-compatible server")
    return models


def _provenance(root: Any) -> dict[str, Any]:
    """Return the stack and plugins that wrote the model, if it is a checkpoint of this project on this machine."""
    try:
        found = read_provenance(root)
        json.dumps([found.stack, found.plugins], allow_nan=False)
    except (CheckpointError, TypeError, ValueError, OSError):
        return {}
    return {"stack": found.stack, "plugins": found.plugins}


def _tokenizer(roots: Sequence[Any], *, started: bool) -> str | None:
    named = [root for root in roots if isinstance(root, str) and root and "\0" not in root]
    for root in named:
        if any((Path(root) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return root
    return named[-1] if named and started else None


def _tokens(tokenizer: str) -> np.ndarray:
    from arctic_plugins_vllm.compat import plain_tokens

    try:
        found = plain_tokens(tokenizer)
    except Exception as error:  # tokenizers' libraries raise anything
        raise ConfigError(
            f"the tokenizer {tokenizer} cannot be loaded: {type(error).__name__}: {error}",
            fix="set --tokenizer to a directory or Hub id",
        ) from error
    if not found:
        raise ConfigError(f"the tokenizer {tokenizer} has no tokens", fix="set --tokenizer to another")
    return np.array(found)


async def measure_all(
    targets: Sequence[Target],
    loads: Sequence[Load],
    *,
    rounds: int,
    seed: int,
    sampling: Sampling,
    begin: Callable[[str, int], None],
    advance: Callable[[], None],
) -> dict[str, dict[str, list[Measurement]]]:
    """Measure every load on every target, ``rounds`` times.

    In a round, each load is measured on all targets one after the other, in an order that alternates between rounds, so
    that a slow minute of the machine meets all. Prompts are random tokens, the same for all targets and different in
    every round, so that no prefix cache contains them.

    Args:
        targets: their names are unique.
        loads: their names are unique.
        rounds: at least 1.
        seed: of the prompts.
        sampling: what requests have in common.
        begin: called with a text and the number of requests that follow.
        advance: called after each of them.

    Returns:
        Load -> target -> one measurement for each round.

    Raises:
        ArcticError: a request that a target gets for each load beforehand, for it to warm up, failed.
    """
    tokens = targets[0].tokens
    for target in targets[1:]:
        tokens = np.intersect1d(tokens, target.tokens)
    if not len(tokens):
        raise ConfigError("the tokenizers of the two servers have no token id in common", fix="compare others")
    begin("warming up", len(targets) * len(loads))
    for target in targets:
        for number, load in enumerate(loads):
            single = Load(load.name, load.curve, load.intensity, (Request(0.0, *_shape(load)),))
            [record] = (await measure(target, single, tokens, (seed, 0, number), sampling, advance)).records
            if record.error is not None:
                raise ArcticError(f"{_shown(target)}: the first request of '{load.name}' failed: {record.error}")
    found: dict[str, dict[str, list[Measurement]]] = {
        load.name: {target.name: [] for target in targets} for load in loads
    }
    for index in range(rounds):
        for number, load in enumerate(loads):
            for target in targets if index % 2 == 0 else targets[::-1]:
                part = f"{index + 1}/{rounds}" if rounds > 1 else ""
                begin(" ".join(filter(None, (load.name, target.name, part))), len(load.requests))
                measured = await measure(target, load, tokens, (seed, index + 1, number), sampling, advance)
                found[load.name][target.name].append(measured)
    return found


def _shape(load: Load) -> tuple[int, int]:
    return load.requests[0].prompt_length, load.requests[0].response_length


def _shown(target: Target) -> str:
    return target.name or without_password(target.url)


async def measure(
    target: Target,
    load: Load,
    tokens: np.ndarray,
    seed: Sequence[int],
    sampling: Sampling,
    advance: Callable[[], None],
) -> Measurement:
    """Send the requests of ``load`` to ``target`` at their times, and wait for all responses."""
    from arctic_plugins_vllm.compat import ask

    records: list[Record | None] = [None] * len(load.requests)
    limit: Any = contextlib.nullcontext() if load.clients is None else asyncio.Semaphore(load.clients)

    async def send(index: int, request: Request) -> None:
        async with limit:
            prompt = tokens[np.random.default_rng([*seed, index]).integers(0, len(tokens), request.prompt_length)]
            sent = time.perf_counter()
            output = await ask(
                session,
                f"{target.url}/v1/completions",
                target.model,
                prompt.tolist(),
                request.response_length,
                ignore_eos=sampling.ignore_eos,
                extra_body=sampling.extra_body,
            )
            records[index] = _record(request, sent - start, time.perf_counter() - sent, output)
        advance()

    async with _session(target.url, sampling.timeout) as session:
        before = await _counters(session, target.url)
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(load.requests):
                if (left := start + request.arrival - time.perf_counter()) > 0:
                    await asyncio.sleep(left)
                group.create_task(send(index, request))
        after = await _counters(session, target.url)
    done = _checked([record for record in records if record is not None], load, sampling)
    return Measurement(
        records=done,
        seconds=max(record.sent + record.latency for record in done) - min(record.sent for record in done),
        counters={name: value - before[name] for name, value in after.items() if name in before},
    )


def _record(request: Request, sent: float, elapsed: float, output: Any) -> Record:
    if not output.success:
        return Record(request.arrival, sent, latency=elapsed, error=_last_line(output.error))
    return Record(
        arrival=request.arrival,
        sent=sent,
        ttft=output.ttft,
        latency=output.latency,
        itl=tuple(output.itl),
        prompt_tokens=output.prompt_len,
        response_tokens=output.output_tokens or 0,
    )


def _checked(records: Sequence[Record], load: Load, sampling: Sampling) -> list[Record]:
    """Return ``records`` with an error where a response is shorter than asked for.

    vLLM's function takes a stream that ends with an error for a success. With ``ignore_eos``, the number of tokens
    shows it; without, that the usage at the end is absent, which other responses have. From a server that never reports
    usage, chunks are counted.
    """
    counted = any(record.response_tokens for record in records)

    def check(record: Record, request: Request) -> Record:
        if record.error is not None:
            return record
        chunks = 1 + len(record.itl)
        tokens = record.response_tokens if counted else chunks
        if (tokens == request.response_length) if sampling.ignore_eos else tokens:
            return replace(record, response_tokens=tokens)
        return replace(record, error=f"the response ended after {tokens or chunks} of {request.response_length} tokens")

    return [check(record, request) for record, request in zip(records, load.requests, strict=True)]


def _last_line(error: str) -> str:
    """Return the message at the end of a traceback, with the type of the exception unless it is the server's word."""
    lines = [line for line in error.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no message"
    if parts := re.match(r"(?:[\w.]*\.)?(\w+): (.*)", last):
        last = parts[2] if parts[1] == Refused.__name__ else f"{parts[1]}: {parts[2]}"
    return last[:500]


async def _counters(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Return the values of :data:`COUNTERS`, summed over engines; empty from a server without them."""
    try:
        async with session.get(f"{url}/metrics", timeout=aiohttp.ClientTimeout(total=10)) as response:
            families = list(text_string_to_metric_families(await response.text()))
    except (Refused, aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return {}
    found: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        if (name := COUNTERS.get(sample.name)) is not None:
            found[name] = found.get(name, 0) + sample.value
    return found
