"""The main job, on the real model: `arctic demo`."""

from html.parser import HTMLParser

import pytest
import torch
from arctic_plugins_demo.budget import StepBudget
from arctic_plugins_demo.model import smollm2
from arctic_plugins_demo.page import write_report
from arctic_plugins_demo.run import DemoReport, ServedAnswer, one_of_each_kind
from arctic_plugins_demo.serving import Server
from arctic_plugins_demo.text_to_sql import generate
from arctic_plugins_huggingface import load_model
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments, get_linear_schedule_with_warmup

from arctic_plugins.errors import ArcticError
from arctic_plugins.provenance import FILE_NAME


def test_the_questions_served_are_of_different_kinds():
    questions = one_of_each_kind(generate(72, seed=0, split="test"), 3)
    assert len({example.template for example in questions}) == 3


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 8), (10.0, 10), (1000.0, 20)], ids=["least", "budget", "planned"])
def test_a_run_is_as_long_as_its_time_allows_at_the_speed_of_its_first_steps(tmp_path, monkeypatch, seconds, steps):
    """On a machine that does a step in a second, after a first one of a minute."""
    now = [0.0]
    monkeypatch.setattr("arctic_plugins_demo.budget.time.perf_counter", lambda: now[0])
    arguments, state, control = (
        TrainingArguments(tmp_path, max_steps=20, use_cpu=True),
        TrainerState(max_steps=20),
        TrainerControl(),
    )
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 6, 20)
    budget, rates = StepBudget(seconds, least=8), []
    while state.global_step < state.max_steps:
        budget.on_step_begin(arguments, state, control)
        optimizer.step()
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
        state.global_step += 1
        now[0] += 1 if len(rates) > 1 else 60
        budget.on_step_end(arguments, state, control, lr_scheduler=schedule)
    assert (state.max_steps, arguments.max_steps) == (steps, steps)
    alone = get_linear_schedule_with_warmup(optimizer, 6, steps).lr_lambdas[0]
    assert rates == pytest.approx([alone(step) for step in range(steps)])


def test_the_page_is_one_file_that_fetches_nothing_and_escapes_what_models_say(tmp_path):
    scores = {"count": (1, 6), "order": (5, 6)}
    report = DemoReport(
        dict.fromkeys(("before", "after", "merged"), scores),
        [(5, 1.5), (10, 0.2)],
        encoded_bytes=107,
        plain_bytes=212,
        machine="a & b",
    )
    report.served = [ServedAnswer("How many <script>?", "SELECT '<img src=x>'", True, 3, 3)]
    write_report(report, tmp_path / "report.html")
    tags, attributes = [], []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            attributes.extend(attrs)

    text = (tmp_path / "report.html").read_text()
    Parser().feed(text)
    assert {"svg", "table", "pre"} <= {*tags}
    assert not {"script", "img", "link", "iframe"} & {*tags}
    assert not [
        value for name, value in attributes if name in ("src", "href", "xlink:href") and not value.startswith("#")
    ]
    assert "url(http" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;img src=x&gt;" in text
    assert "5/6" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_a_server_that_ends_says_why(tmp_path):
    with (
        pytest.raises(ArcticError, match="the server ended with status 2: .*has no config.json"),
        Server([str(tmp_path / "nowhere")], tmp_path / "log", timeout=60),
    ):
        pass


def test_the_model_is_made_once(tmp_path):
    """The real SmolLM2, from the package that ships it (or the hub)."""
    directory = smollm2(tmp_path)
    assert (directory / FILE_NAME).is_file()
    stamp = (directory / "model.safetensors").stat().st_mtime_ns
    assert smollm2(tmp_path) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == stamp
    model, tokenizer = load_model(directory)
    assert (model.arctic_stored_dtype or model.dtype) == torch.bfloat16
    assert 134e6 < model.num_parameters() < 136e6
    assert tokenizer.chat_template
