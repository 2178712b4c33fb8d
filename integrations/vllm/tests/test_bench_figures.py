"""`arctic bench` without a server: arrivals, traces, figures and intervals."""

import json
import math

import numpy as np
import pytest
from arctic_plugins_vllm.bench import loads
from arctic_plugins_vllm.bench.loads import Load, Request, batches, fit, poisson, read_trace, replay
from arctic_plugins_vllm.bench.summary import Measurement, Record, compare, in_flight, interval, summarize
from arctic_plugins_vllm.bench.urls import base_url, redacted, without_password
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_plugins.errors import ConfigError, DataError

LINE = {"timestamp": 1500, "queries": [{"prompt_length": 20, "response_length": 5}]}


@pytest.fixture
def trace(tmp_path):
    def write(*lines):
        path = tmp_path / "trace.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    return write


def test_arrivals_are_a_poisson_process():
    times = poisson(20_000, 4.0, seed=1)
    intervals = np.diff(times)
    assert times[0] == 0
    assert intervals.mean() == pytest.approx(1 / 4, rel=0.03)
    assert intervals.var() == pytest.approx(1 / 16, rel=0.06)  # an exponential distribution's
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.mean() == pytest.approx(4, rel=0.03)
    assert counts.var() == pytest.approx(4, rel=0.06)  # a Poisson distribution's
    assert np.array_equal(times, poisson(20_000, 4.0, seed=1))
    assert not np.array_equal(times, poisson(20_000, 4.0, seed=2))
    assert not poisson(5, math.inf, seed=0).any(), "all at once"


def test_a_trace_is_read_in_the_order_of_arrival(trace):
    later = {"timestamp": 4000, "queries": [{"prompt_length": 7, "response_length": 1, "other": "ignored"}] * 2}
    path = trace(later, "", LINE, {"timestamp": 9000, "queries": []})
    assert read_trace(path) == [Request(0.0, 20, 5), Request(2.5, 7, 1), Request(2.5, 7, 1)]
    assert read_trace(path, most=1) == [Request(0.0, 7, 1)], "the first of the file"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 has no list 'queries'"),
        ({**LINE, "queries": {}}, "line 2 has no list 'queries'"),
        ({**LINE, "queries": [[[1]]]}, r"line 2: found '\[\[1\]\]' among its queries"),
        ({"queries": LINE["queries"]}, "line 2: 'timestamp' is None"),
        ({**LINE, "timestamp": -1}, "line 2: 'timestamp' is -1"),
        ({**LINE, "timestamp": True}, "line 2: 'timestamp' is True"),
        ({**LINE, "timestamp": "0"}, "line 2: 'timestamp' is 0"),
        ('{"timestamp": NaN, "queries": []}', "line 2 is not JSON: NaN"),
        ('{"timestamp": 1e999, "queries": []}', "line 2: 'timestamp' is inf"),
        ('{"timestamp": 1' + "0" * 5000 + ', "queries": []}', "line 2 is not JSON"),
        ('{"timestamp": 1' + "0" * 400 + ', "queries": []}', "line 2: 'timestamp' is 10000.*expected milliseconds"),
        ({**LINE, "queries": [{"prompt_length": 0, "response_length": 1}]}, "'prompt_length' is 0"),
        ({**LINE, "queries": [{"prompt_length": 1.5, "response_length": 1}]}, "'prompt_length' is 1.5"),
        ({**LINE, "queries": [{"prompt_length": 1, "response_length": 10**9}]}, "'response_length' is 1000000000"),
        ({**LINE, "queries": [{"prompt_length": 1}]}, "'response_length' is None"),
        (" " * (loads.LONGEST_LINE + 1), "line 2 is longer than"),
    ],
)
def test_a_malformed_line_is_named(trace, line, message):
    with pytest.raises(DataError, match=message) as raised:
        read_trace(trace(LINE, line, LINE))
    assert len(str(raised.value)) < 500


def test_a_trace_of_nothing_or_too_much_is_refused(trace, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="has no request"):
        read_trace(trace("", {"timestamp": 0, "queries": []}))
    with pytest.raises(DataError, match="there is no trace"):
        read_trace(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        read_trace(tmp_path / "bytes")
    monkeypatch.setattr(loads, "MOST_REQUESTS", 2)
    path = trace(LINE, LINE, LINE)
    with pytest.raises(DataError, match="more than 2 requests; use fewer with --requests"):
        read_trace(path)
    assert len(read_trace(path, most=2)) == 2


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["timestamp", "queries", "prompt_length", "response_length"]), inner, max_size=4
                )
            ),
            max_leaves=8,
        ),
        max_size=3,
    )
)
def test_any_json_is_read_or_refused(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    try:
        found = read_trace(path)
    except DataError:
        return
    assert all(0 <= request.arrival < 1e13 and request.prompt_length > 0 for request in found)


TRACED = [Request(0.0, 10, 5), Request(1.0, 20, 6), Request(4.0, 30, 7)]


def arrivals(**options):
    return [request.arrival for request in replay(TRACED, **options)]


def test_a_trace_is_replayed_as_asked():
    assert replay(TRACED) == tuple(TRACED)
    assert arrivals(rate=1.0) == [0.0, 0.5, 2.0], "two intervals in two seconds"
    assert arrivals(arrival="uniform") == [0.0, 2.0, 4.0], "at the rate of the trace"
    assert arrivals(arrival="uniform", rate=4.0) == [0.0, 0.25, 0.5]
    assert arrivals(arrival="random", rate=4.0, seed=3) == poisson(3, 4.0, 3).tolist()
    assert arrivals(arrival="random", seed=3) == pytest.approx(poisson(3, 0.5, 3).tolist())
    assert arrivals(rate=math.inf) == [0.0, 0.0, 0.0]
    changed = replay(TRACED, prompt_length=8, response_length=9)
    assert {(request.prompt_length, request.response_length) for request in changed} == {(8, 9)}


def test_a_rate_that_cannot_be_is_refused():
    together = [Request(0.0, 10, 5)] * 3
    assert replay(together) == tuple(together)
    with pytest.raises(ConfigError, match="arrive at the same time, which no factor"):
        replay(together, rate=2.0)
    with pytest.raises(ConfigError, match="it has no rate; set one with --rates"):
        replay(together, arrival="random")
    assert [request.arrival for request in replay(together, arrival="uniform", rate=2.0)] == [0.0, 0.5, 1.0]
    with pytest.raises(ConfigError, match="would arrive after 231 days; expected at most 30"):
        replay(TRACED, rate=1e-7)
    assert replay(TRACED[:1], rate=1e-6) == (TRACED[0],), "a single request has no rate"


def test_what_exceeds_the_context_is_counted_or_clipped():
    load = Load("trace", "trace", "", tuple(TRACED))
    assert fit(load, 37, clip=False) is load
    with pytest.raises(ConfigError, match=r"2 of 3 requests of 'trace' exceed the model's 20 tokens, .* 30 \+ 7"):
        fit(load, 20, clip=False)
    clipped = fit(load, 20, clip=True).requests
    assert [(request.prompt_length, request.response_length) for request in clipped] == [(10, 5), (14, 6), (13, 7)]
    short = fit(load, 4, clip=True).requests
    assert [(request.prompt_length, request.response_length) for request in short] == [(1, 3)] * 3
    with pytest.raises(ConfigError, match="exceed"):
        fit(load, 1, clip=True)


def test_batches_are_sizes_times_lengths():
    assert [(load.name, load.curve, len(load.requests)) for load in batches([1, 4], [8, 16], 2)] == [
        ("1 x 8", "prompts of 8", 1),
        ("4 x 8", "prompts of 8", 4),
        ("1 x 16", "prompts of 16", 1),
        ("4 x 16", "prompts of 16", 4),
    ]


def test_figures_are_those_of_numpy():
    generator = np.random.default_rng(0)
    records = []
    for index in range(50):
        itl = generator.exponential(0.02, index % 7)
        ttft = float(generator.exponential(0.3))
        records.append(Record(index * 0.1, index * 0.1 + 0.001, ttft, ttft + float(itl.sum()), itl, 10, 1 + len(itl)))
    failed = Record(5.0, 5.0, latency=9.0, error="HTTP 500")
    found = summarize(
        [Measurement([*records[:20], failed], 4.0, {"drafts": 2}), Measurement(records[20:], 6.0, {"drafts": 3})]
    )
    tokens = sum(record.response_tokens for record in records)
    assert (found["requests"], found["failed"], found["seconds"]) == (51, 1, 10.0)
    assert found["tokens_per_second"] == pytest.approx(tokens / 10)
    assert found["requests_per_second"] == 5.0
    assert found["counters"] == {"drafts": 5}
    expected = {
        "ttft": [record.ttft for record in records],
        "tpot": [np.mean(record.itl) for record in records if len(record.itl)],
        "itl": np.concatenate([record.itl for record in records]),
        "e2e": [record.latency for record in records],
    }
    for name, values in expected.items():
        assert found[name]["mean"] == pytest.approx(np.mean(values)), name
        for percent in (50, 90, 95, 99):
            assert found[name][f"p{percent}"] == pytest.approx(np.percentile(values, percent)), name
    assert found["sent_late"]["p50"] == pytest.approx(0.001)


def test_without_a_success_there_are_no_figures():
    found = summarize([Measurement([Record(0.0, 0.0, latency=1.0, error="no")], 1.0)])
    assert found["tokens_per_second"] == 0
    assert found["ttft"] == {"mean": None, "p50": None, "p90": None, "p95": None, "p99": None}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_requests_in_flight_are_counted_between_events():
    records = [Record(0, 0.0, latency=3.0), Record(0, 1.0, latency=1.0), Record(0, 2.0, latency=2.0)]
    times, counts = in_flight(records)
    assert times == [0.0, 1.0, 2.0, 2.0, 3.0, 4.0]
    assert counts == [1, 2, 1, 2, 1, 0], "one that begins when another ends does not meet it"


@pytest.mark.parametrize("rounds", [4, 5, 10])
def test_an_interval_covers_the_mean_as_often_as_it_says(rounds):
    generator = np.random.default_rng(rounds)
    hits, repetitions = 0, 400
    for repetition in range(repetitions):
        low, high = interval(generator.normal(0.3, 0.1, rounds), seed=repetition)
        hits += low <= 0.3 <= high
    assert 0.92 <= hits / repetitions <= 0.98


def rounds_of(speeds):
    return [Measurement([Record(0, 0, 1 / speed, 10 / speed, (9 / speed,), 1, 10)], 10 / speed) for speed in speeds]


def test_two_servers_are_compared_round_by_round():
    """The machine's speed varies by a factor of ten between rounds, the ratio hardly."""
    machine = np.array([1.0, 10.0, 3.0, 5.0, 2.0, 7.0])
    noise = np.array([1.01, 0.99, 1.02, 0.98, 1.0, 1.005])
    found = compare(rounds_of(machine), rounds_of(machine * 1.5 * noise))
    for name, expected in {"tokens_per_second": 1.5, "ttft_p50": 1 / 1.5, "e2e_p99": 1 / 1.5}.items():
        assert found[name]["low"] < expected < found[name]["high"]
        assert found[name]["high"] / found[name]["low"] < 1.06
    few = compare(rounds_of([1.0, 2.0]), rounds_of([2.0, 4.0]))["tokens_per_second"]
    assert few == {"ratio": pytest.approx(2), "low": None, "high": None}
    nothing = compare(rounds_of([1.0]), [Measurement([Record(0, 0, latency=1.0, error="no")], 1.0)])
    assert set(nothing["ttft_p50"].values()) == {None}


def test_urls_of_servers():
    assert base_url("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000"
    assert base_url("https://example.org/models/v1") == "https://example.org/models"
    for wrong in ("127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://host?x=1"):
        with pytest.raises(ConfigError, match="URL"):
            base_url(wrong)
    assert without_password("http://user:secret@host:1/v1") == "http://host:1/v1"


def test_secrets_are_not_recorded():
    command = ["x", "--api-key", "secret", "secret", "--seed", "1", "--hf_token=secret", "a --api-key secret --seed 2"]
    command += ["http://user:secret@host"]
    assert redacted(command) == [
        *("x", "--api-key", "***", "***", "--seed", "1", "--hf_token=***", "a --api-key '***' --seed 2", "http://host")
    ]
