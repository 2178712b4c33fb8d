"""Drafts from a request's own text and from past answers, against the definition."""

import random
from collections import Counter

import numpy as np
import pytest
from arctic_plugins_speculate.suffix import (
    CANDIDATES,
    KEY,
    ROW_COST,
    SCANNED,
    History,
    SuffixDrafter,
    _follow,
    _in_text,
)

OPTIONS = {
    "tokens": 8,
    "min_token_prob": 0.15,
    "max_spec_factor": 4.0,
    "max_tree_depth": 16,
    "max_cached_requests": 100,
    "ends": {1},
    "max_length": 512,
}


def drafter(**options):
    return SuffixDrafter(**{**OPTIONS, **options})


def array(tokens):
    return np.array(tokens, dtype=np.int32)


def defined(texts, end, deepest, *, own):
    """The longest end of ``end`` that occurs in one of ``texts``, by the definition: its length, and the first draft
    token's share with the tokens that have it.
    """
    for length in range(min(deepest, len(end) - own), 1, -1):
        after = Counter(
            text[at + length]
            for text in texts
            for at in range(len(text) - length)
            if text[at : at + length] == end[-length:]
        )
        if after:
            most = max(after.values())
            return length, most / after.total(), {token for token, count in after.items() if count == most}
    return 0, 0.0, set()


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_match_and_its_most_frequent_continuation(seed):
    draw = random.Random(seed)
    letters = draw.choice([2, 3, 5])
    texts = [[draw.randrange(letters) for _ in range(draw.randrange(2, 40))] for _ in range(6)]
    end = [draw.randrange(letters) for _ in range(12)]
    found, draft, shares = np.empty(CANDIDATES, dtype=np.int64), array([0] * 8), np.empty(8)
    history = History(answers=6)
    for text in texts:
        history.add(array(text))
    length, count = history.find(array(end), len(end), 9, found)
    # What ends with the match has nothing after it: the definition does not count it, and neither does a share.
    drafted = history.follow(found, count, array([]), draft, shares) if count else 0
    expected, share, tokens = defined(texts, end, 9, own=False)
    if drafted:
        assert (length, shares[0]) == (expected, share)
        assert draft[0] in tokens
    else:
        assert length >= expected  # the longest match is at the end of each of the texts that have it
    length, count = _in_text(array(end), len(end), 9, found)
    expected, share, tokens = defined([end], end, 9, own=True)
    assert length == expected
    if length:
        assert _follow(array(end), -1, len(end), True, found, count, array([]), draft, shares) == 8
        assert shares[0] == share
        assert draft[0] in tokens


def test_a_text_that_repeats_itself_is_continued_beyond_its_end():
    text, found, draft, shares = [5, 6, 7, 8] * 3, np.empty(CANDIDATES, dtype=np.int64), array([0] * 10), np.empty(10)
    _, count = _in_text(array(text), len(text), 8, found)
    assert _follow(array(text), -1, len(text), True, found, count, array([]), draft, shares) == 10
    assert draft.tolist() == [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]


def test_the_oldest_answers_and_tokens_are_forgotten():
    history, found = History(answers=2, capacity=64), np.empty(CANDIDATES, dtype=np.int64)
    size = history.nbytes

    def known(answer):
        return history.find(array(answer), len(answer), 8, found)[0]

    answers = [list(range(start, start + 10)) for start in (100, 200, 300)]
    for answer in answers:
        history.add(array(answer))
    assert [known(answer[:4]) for answer in answers] == [0, 4, 4]
    history.add(array(range(1000, 1060)))  # 64 tokens: over all of them
    assert [known(answer[:4]) for answer in answers] == [0, 0, 0]
    assert known([1010, 1011]) == 2
    for start in range(0, 100_000, 100):
        history.add(array(range(start, start + 100)))  # longer than all that is kept
    assert history.nbytes == size
    assert known([99_990, 99_991]) == 2


class Engine:
    """Rows of an engine that chooses given answers, and takes the drafts that agree with them."""

    def __init__(self, drafter, length=512):
        self.drafter, self.tokens = drafter, np.zeros((64, length), dtype=np.int32)

    def run(self, *requests):
        """Answer (prompt, answer) side by side; return for each the number of steps, and of tokens offered in vain."""
        running = [
            {"text": list(prompt), "left": list(answer), "draft": [], "steps": 0, "vain": 0}
            for prompt, answer in requests
        ]
        every = list(running)
        while running:
            sampled = []
            for row, each in enumerate(running):
                count = 0
                while (
                    count < min(len(each["draft"]), len(each["left"]) - 1)
                    and each["draft"][count] == each["left"][count]
                ):
                    count += 1
                each["vain"] += len(each["draft"]) - count
                sampled.append(each["left"][: count + 1])
                each["text"] += sampled[-1]
                each["left"] = each["left"][count + 1 :]
                each["steps"] += 1
                self.tokens[row, : len(each["text"])] = each["text"]
            drafts = self.drafter.propose(sampled, np.array([len(each["text"]) for each in running]), self.tokens)
            for each, draft in zip(running, drafts, strict=True):
                each["draft"] = draft
            running = [each for each in running if each["left"]]
            running.reverse()  # rows move
        self.drafter.propose([[]], np.array([0]), self.tokens)
        return [(each["steps"], each["vain"]) for each in every]


def words(draw, count):
    return [draw.randrange(10, 1000) for _ in range(count)]


def test_an_answer_that_was_given_before_takes_few_steps():
    engine, draw = Engine(drafter()), random.Random(0)
    question, answer = words(draw, 40), words(draw, 63)
    assert engine.run((question, answer)) == [(63, 0)]
    assert engine.run((question, answer))[0][0] <= 10  # 9 tokens a step, of which 8 are drafted
    assert engine.run((words(draw, 40), answer))[0][0] <= 12  # after other words: a match begins with two tokens
    off = Engine(drafter(max_cached_requests=0))
    assert [off.run((question, answer))[0][0] for _ in range(2)] == [63, 63]


def test_a_text_copied_from_the_prompt_takes_few_steps():
    draw = random.Random(0)
    prompt = words(draw, 60)
    assert Engine(drafter(max_cached_requests=0)).run((prompt, prompt[5:50]))[0][0] <= 10


def test_what_is_never_accepted_is_soon_not_offered():
    """Words recur, and what followed them never does."""
    engine, draw = Engine(drafter()), random.Random(0)
    pairs = [(draw.randrange(10, 20), draw.randrange(10, 20)) for _ in range(4000)]
    answers = [
        [token for pair in pairs[at : at + 40] for token in (*pair, draw.randrange(1000, 10**6))]
        for at in range(0, 4000, 40)
    ]
    vain = [engine.run((words(draw, 5), answer))[0][1] for answer in answers]
    assert sum(vain[:5]) > 0
    assert sum(vain[-50:]) / (50 * 120) < 0.02
    # And is offered again when it would have been accepted, without having been offered meanwhile.
    question, answer = words(draw, 40), words(draw, 60)
    assert [engine.run((question, answer))[0][0] for _ in range(4)][-1] <= 20


def test_rows_that_move_keep_their_requests():
    engine, draw = Engine(drafter()), random.Random(1)
    requests = [(words(draw, 20), words(draw, draw.randrange(20, 60))) for _ in range(3)]
    engine.run(*requests)
    for steps, (_, answer) in zip(engine.run(*requests), requests, strict=True):
        assert steps[0] <= len(answer) / 4
    # One that no step shows is over: its answer, after the end of its prompt, is in the history, and nothing else is.
    assert not any(engine.drafter._requests.values())
    stored = engine.drafter._history._total
    assert stored == 2 * sum(1 + OPTIONS["max_tree_depth"] + len(answer) for _, answer in requests)


def test_the_more_requests_the_surer_a_draft_has_to_be():
    proposer, draw = drafter(min_token_prob=0.0), random.Random(0)
    thresholds = [proposer._threshold(requests) for requests in (0, 1, 8, 64, 1024)]
    assert thresholds == sorted(thresholds)
    assert thresholds[1] == pytest.approx(ROW_COST / (1 + ROW_COST))
    assert thresholds[-1] > 0.9
    text = words(draw, 40)
    text += text[5:25]
    alone = proposer.propose([text[-1:]], np.array([len(text)]), array([text]))[0]
    crowd = [text] + [words(draw, len(text)) for _ in range(199)]
    drafts = proposer.propose([each[-1:] for each in crowd], np.array([len(text)] * 200), array(crowd))
    assert len(alone) > 4
    assert drafts == [[]] * 200


def test_bounds_of_a_draft():
    text = [*range(10, 35), 1, *range(50, 60), *range(20, 30)]  # 1 ends answers

    def draft(**options):
        return drafter(min_token_prob=0.0, **options).propose([text[-1:]], np.array([len(text)]), array([text]))[0]

    assert draft() == [*range(30, 35), 1]
    assert draft(tokens=4) == list(range(30, 34))
    assert draft(max_tree_depth=3, max_spec_factor=1.0) == [30, 31, 32]
    assert draft(max_length=len(text) + 3) == [30, 31]  # and the token that the model adds
    assert draft(max_length=len(text)) == []
    assert drafter().propose([[], []], np.array([5, 7]), array([[0] * 8] * 2)) == [[], []]  # in the middle of prompts


def test_short_and_long_texts():
    for text in ([4], [4, 5], [4] * (KEY - 1)):
        drafter().propose([text[-1:]], np.array([len(text)]), array([text]))
    text = array([7, 8, 9] + [3] * (SCANNED + 10) + [7, 8])
    assert drafter(max_length=10**6).propose([[8]], np.array([len(text)]), text[None]) == [[]]  # too far back
