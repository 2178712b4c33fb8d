"""Suffix decoding: drafts copied from what followed the same words earlier in a text, or in past answers.

Oliaro et al., "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications" (2024, arXiv 2411.04975),
keep two suffix trees, one over each request and one over past answers, and draft the most frequent continuation of the
longest match. A node of such a tree is a set of positions in the text. Here the sets are computed when they are needed:
for a request by scanning its tokens, for past answers through chains of equal pairs of tokens in a ring, like the
match finder of zlib (``deflate.c``). This takes 20 bytes per token, and the ring forgets its oldest answers by itself.

Whether a draft is worth computing is learned rather than configured. Every draft is compared with the tokens that the
model then chooses, including drafts that were not given to it, so that estimates stay current without trying anything
out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["Draft", "History", "SuffixDrafter"]

Tokens = NDArray[np.int32]
Find = Callable[..., tuple[int, int]]
Follow = Callable[..., int]

SEPARATOR = -1
"""Between answers in a :class:`History`. It is not a token, so that no match and no draft crosses it."""
SCANNED = 1 << 16
"""The most tokens of a request, the last ones, that are scanned for a match."""
CANDIDATES = 64
"""The most positions whose continuations are counted, the most recent ones."""
TRIED = 512
"""The most positions that are compared with the end of a text."""
CAPACITY = 1 << 18
"""The most tokens of past answers that are remembered: 5 MB."""
ROW_COST = 0.12
"""Time that another row takes in a step, relative to everything in the step that does not depend on the number of rows.

docs/speculation.md has measurements.
"""
KEY = 8
"""Number of tokens by which a request is recognized in the next step; see :meth:`SuffixDrafter.propose`."""
_LENGTHS = (2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 65)
"""The smallest length of a match in each class whose acceptance is estimated."""
_PRIOR = (0.35, 0.45, 0.5, 0.55, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""The acceptance that is assumed for each class before anything was observed."""
_WEIGHT, _REQUEST_WEIGHT = 4.0, 4.0
"""Number of observations that the assumption weighs, for a class and for a request."""
_DECAY, _REQUEST_DECAY = 0.99, 0.9
"""Each observation reduces the weight of earlier ones by this factor: about the last 100 of a class, and the last 10 of
a request, count.
"""
_CLASS = np.searchsorted(np.array(_LENGTHS), np.arange(_LENGTHS[-1] + 1), side="right") - 1


@njit  # type: ignore[untyped-decorator]
def _in_text(tokens: Tokens, size: int, deepest: int, found: NDArray[np.int64]) -> tuple[int, int]:
    """Find the longest earlier match of the end of ``tokens[:size]``, of 2 to ``deepest`` tokens.

    Returns:
        Its length and the number of positions written to ``found``: where it continues, the most recent first.
    """
    longest, count, tried = 0, 0, 0
    if size < 3:
        return 0, 0
    last, previous = tokens[size - 1], tokens[size - 2]
    for at in range(size - 2, max(0, size - SCANNED), -1):
        if tokens[at] != last or tokens[at - 1] != previous:
            continue
        length = 2
        while length < deepest and length <= at and tokens[at - length] == tokens[size - 1 - length]:
            length += 1
        if length > longest:
            longest, count = length, 0
        if length == longest:
            found[count] = at + 1
            count += 1
        tried += 1
        if count == CANDIDATES or tried == TRIED:
            break
    return longest, count


@njit  # type: ignore[untyped-decorator]
def _hash(first: int, second: int, mask: int) -> int:
    mixed = (np.uint32(first) * np.uint32(0x9E3779B1)) ^ (np.uint32(second) * np.uint32(0x85EBCA77))
    return int(np.uint32(mixed) >> np.uint32(7)) & mask


@njit  # type: ignore[untyped-decorator]
def _append(
    ring: Tokens, links: NDArray[np.int64], heads: NDArray[np.int64], total: int, tokens: Tokens, mask: int
) -> int:
    """Append a separator and ``tokens``; return the new number of tokens ever appended."""
    ring[total & mask] = SEPARATOR
    links[total & mask] = -1
    total += 1
    for index in range(len(tokens)):
        ring[total & mask] = tokens[index]
        links[total & mask] = -1
        if index > 0:
            slot = _hash(tokens[index - 1], tokens[index], len(heads) - 1)
            links[total & mask] = heads[slot]
            heads[slot] = total
        total += 1
    return total


@njit  # type: ignore[untyped-decorator]
def _in_history(
    ring: Tokens,
    links: NDArray[np.int64],
    heads: NDArray[np.int64],
    oldest: int,
    tokens: Tokens,
    size: int,
    deepest: int,
    found: NDArray[np.int64],
) -> tuple[int, int]:
    """Find the longest match of the end of ``tokens[:size]`` in a ring, like :func:`_in_text`."""
    longest, count, tried = 0, 0, 0
    if size < 2:
        return 0, 0
    mask = len(ring) - 1
    last, previous = tokens[size - 1], tokens[size - 2]
    at = heads[_hash(previous, last, len(heads) - 1)]
    while at > oldest and tried < TRIED and count < CANDIDATES:
        if ring[at & mask] == last and ring[(at - 1) & mask] == previous:
            length = 2
            while (
                length < min(deepest, size)
                and at - length >= oldest
                and ring[(at - length) & mask] == tokens[size - 1 - length]
            ):
                length += 1
            if length > longest:
                longest, count = length, 0
            if length == longest:
                found[count] = at + 1
                count += 1
        tried += 1
        at = links[at & mask]
    return longest, count


@njit  # type: ignore[untyped-decorator]
def _follow(
    source: Tokens,
    mask: int,
    end: int,
    repeats: bool,
    found: NDArray[np.int64],
    count: int,
    ends: Tokens,
    draft: Tokens,
    shares: NDArray[np.float64],
) -> int:
    """Write the most frequent continuation from the ``count`` positions in ``found`` to ``draft``.

    Position ``p`` of the text is ``source[p & mask]``. At its ``end`` a text ``repeats`` what is drafted, as in a
    list of equal lines, or ends. ``shares`` gets, for each token, the share of the positions still followed that
    continue with it. A draft ends after one of the tokens ``ends``.

    Returns:
        The number of tokens drafted.
    """
    seen = np.empty(len(found), dtype=np.int32)
    votes = np.empty(len(found), dtype=np.int32)
    nexts = np.empty(len(found), dtype=np.int32)
    for step in range(len(draft)):
        kinds, voters = 0, 0
        for index in range(count):
            at = found[index] + step
            if at < end:
                token = source[at & mask]
            elif repeats:
                token = draft[at - end]
            else:
                token = SEPARATOR
            nexts[index] = token
            if token < 0:
                continue
            voters += 1
            kind = 0
            while kind < kinds and seen[kind] != token:
                kind += 1
            if kind == kinds:
                seen[kind], votes[kind] = token, 0
                kinds += 1
            votes[kind] += 1
        if voters == 0:
            return step
        best = 0
        for kind in range(1, kinds):
            if votes[kind] > votes[best]:
                best = kind
        token = seen[best]
        draft[step] = token
        shares[step] = votes[best] / voters
        for end_token in ends:
            if token == end_token:
                return step + 1
        kept = 0
        for index in range(count):
            if nexts[index] == token:
                found[kept] = found[index]
                kept += 1
        count = kept
    return len(draft)


class History:
    """Past answers, with chains of the positions of each pair of tokens. It takes 20 bytes per token of ``capacity``.

    Args:
        answers: the most answers to remember.
        capacity: the most tokens of them, a power of two.
    """

    def __init__(self, answers: int, capacity: int = CAPACITY) -> None:
        self._starts: deque[int] = deque(maxlen=answers)
        self._ring = np.full(capacity, SEPARATOR, dtype=np.int32)
        self._links = np.full(capacity, -1, dtype=np.int64)
        self._heads = np.full(capacity, -1, dtype=np.int64)
        self._total = 0

    @property
    def nbytes(self) -> int:
        return self._ring.nbytes + self._links.nbytes + self._heads.nbytes

    def add(self, tokens: Tokens) -> None:
        """Append an answer ``[T]``. The oldest answers, and the oldest tokens, are forgotten if there are too many."""
        self._starts.append(self._total)
        kept = tokens[-(len(self._ring) - 1) :]
        self._total = _append(self._ring, self._links, self._heads, self._total, kept, len(self._ring) - 1)

    def find(self, tokens: Tokens, size: int, deepest: int, found: NDArray[np.int64]) -> tuple[int, int]:
        """Find the longest match of the end of ``tokens[:size]``, like :func:`_in_text`."""
        oldest = max(self._starts[0] if self._starts else 0, self._total - len(self._ring))
        return _in_history(self._ring, self._links, self._heads, oldest, tokens, size, deepest, found)

    def follow(self, found: NDArray[np.int64], count: int, ends: Tokens, draft: Tokens, shares: Any) -> int:
        return _follow(self._ring, len(self._ring) - 1, self._total, False, found, count, ends, draft, shares)


@dataclass
class Draft:
    """A draft, and the estimates that go with it."""

    source: int
    """0: the request's own text; 1: past answers."""
    length: int
    """Number of tokens of the match that it continues."""
    tokens: list[int]
    shares: list[float]
    """For each token, the share of the occurrences that continue with it."""
    chances: list[float] = field(default_factory=list)
    """For each token, the estimated probability that it and all before it are accepted."""

    def above(self, least: float) -> list[int]:
        """Return the tokens whose chance is at least ``least``; chances never increase."""
        return self.tokens[: sum(chance >= least for chance in self.chances)]


@dataclass
class _Request:
    """What is remembered of a request between two steps."""

    context: Tokens
    """The end of its prompt."""
    answer: list[int] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    accepted: float = _REQUEST_WEIGHT
    expected: float = _REQUEST_WEIGHT
    """Drafted tokens that were accepted lately, and how many were expected to be."""


class SuffixDrafter:
    """Drafts for all requests of an engine.

    Args:
        tokens: the most tokens to draft for a request.
        min_token_prob: the estimated probability of being accepted below which no token is drafted.
        max_spec_factor: the most tokens to draft for each token of the match.
        max_tree_depth: the longest match, in tokens.
        max_cached_requests: number of past answers to remember, at most :data:`CAPACITY` tokens of them. 0: none.
        ends: tokens that end an answer.
        max_length: the most tokens of a request, prompt and answer.
    """

    def __init__(
        self,
        *,
        tokens: int,
        min_token_prob: float,
        max_spec_factor: float,
        max_tree_depth: int,
        max_cached_requests: int,
        ends: Collection[int],
        max_length: int,
    ) -> None:
        self._tokens, self._least, self._factor = tokens, min_token_prob, max_spec_factor
        self._deepest, self._max_length = max_tree_depth, max_length
        self._history = History(max_cached_requests) if max_cached_requests else None
        self._ends = np.array(sorted(ends), dtype=np.int32)
        self._requests: dict[tuple[int, bytes], list[_Request]] = {}
        self._accepted = [[_WEIGHT * prior for prior in _PRIOR] for _ in range(2)]
        self._expected = [[_WEIGHT] * len(_PRIOR) for _ in range(2)]
        self._found = np.empty(CANDIDATES, dtype=np.int64)
        self._draft = np.empty(tokens, dtype=np.int32)
        self._shares = np.empty(tokens, dtype=np.float64)

    def propose(self, sampled: Sequence[list[int]], lengths: NDArray[Any], token_ids: Tokens) -> list[list[int]]:
        """Return a draft for each request, empty where none is worth it.

        Rows may move between steps and come without names. A request is recognized by its length and its last tokens
        before this step; should two be confused, only estimates suffer.

        Args:
            sampled: for each row, the tokens that the model has just chosen; none in the middle of a prompt.
            lengths: ``[R]``, for each row the number of tokens so far, including these.
            token_ids: ``[R, T]``, the tokens themselves.
        """
        before, self._requests = self._requests, {}
        drafts: list[Draft | None] = []
        for row, (new, size) in enumerate(zip(sampled, lengths.tolist(), strict=False)):
            drafts.append(None)
            if not new:
                continue
            tokens, start = token_ids[row], size - len(new)
            known = before.get(_key(tokens, start))
            if known:
                request = known.pop()
                self._learn(request, new)
            else:
                request = _Request(tokens[max(0, start - self._deepest) : start].copy())
            request.answer += new
            most = min(self._tokens, self._max_length - size - 1)
            request.drafts = self._drafts(tokens, size, most) if most > 0 else []
            for draft in request.drafts:
                self._estimate(draft, request)
            drafts[-1] = max(request.drafts, key=lambda draft: sum(draft.chances), default=None)
            self._requests.setdefault(_key(tokens, size), []).append(request)
        if self._history is not None:
            for gone in (request for requests in before.values() for request in requests):
                self._history.add(np.concatenate([gone.context, np.array(gone.answer, dtype=np.int32)]))
        least = self._threshold(sum(bool(new) for new in sampled))
        return [[] if draft is None else draft.above(least) for draft in drafts]

    def _threshold(self, requests: int) -> float:
        """Return the chance of being accepted from which on another row makes answers come sooner.

        A step with ``r`` rows takes ``1 + c r``, with ``c`` = :data:`ROW_COST`, and yields ``r`` tokens. One more row,
        whose token is accepted with probability ``p``, increases tokens per time if ``p / r > c / (1 + c r)``.
        """
        rows = requests * ROW_COST
        return max(self._least, rows / (1 + rows))

    def _drafts(self, tokens: Tokens, size: int, most: int) -> list[Draft]:
        """Return the drafts of up to ``most`` tokens that continue ``tokens[:size]``, from each source that has one."""
        made: list[Draft] = []
        sources: list[tuple[Find, Follow]] = [(_in_text, partial(_follow, tokens, -1, size, True))]
        if self._history is not None:
            sources.append((self._history.find, self._history.follow))
        for source, (find, follow) in enumerate(sources):
            length, count = find(tokens, size, self._deepest, self._found)
            if not count:
                continue
            room = min(most, max(1, int(length * self._factor)))
            draft, shares = self._draft[:room], self._shares[:room]
            if drafted := follow(self._found, count, self._ends, draft, shares):
                made.append(Draft(source, length, draft[:drafted].tolist(), shares[:drafted].tolist()))
        return made

    def _estimate(self, draft: Draft, request: _Request) -> None:
        accepted, expected = self._accepted[draft.source], self._expected[draft.source]
        lately, chance = min(1.0, request.accepted / request.expected), 1.0
        for index, share in enumerate(draft.shares):
            kind = _kind(draft.length + index)
            chance *= share * lately * min(1.0, accepted[kind] / expected[kind])
            draft.chances.append(chance)

    def _learn(self, request: _Request, new: list[int]) -> None:
        """Compare the drafts of the last step, offered or not, with the tokens that the model has chosen."""
        for draft in request.drafts:
            accepted, expected = self._accepted[draft.source], self._expected[draft.source]
            for index, (token, share, chosen) in enumerate(zip(draft.tokens, draft.shares, new, strict=False)):
                kind, right = _kind(draft.length + index), token == chosen
                estimate = share * min(1.0, accepted[kind] / expected[kind])
                accepted[kind] = accepted[kind] * _DECAY + right
                expected[kind] = expected[kind] * _DECAY + share
                request.accepted = request.accepted * _REQUEST_DECAY + right
                request.expected = request.expected * _REQUEST_DECAY + estimate
                if not right:
                    break


def _kind(length: int) -> int:
    return int(_CLASS[min(length, _LENGTHS[-1])])


def _key(tokens: Tokens, size: int) -> tuple[int, bytes]:
    return size, tokens[max(0, size - KEY) : size].tobytes()
