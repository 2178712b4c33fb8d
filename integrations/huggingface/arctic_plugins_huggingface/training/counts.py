"""Count what happens to the rows of the training data, and check them against the limits of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from arctic_plugins.errors import DataError

__all__ = ["DataCounts", "Limits", "UnknownTokens"]

_EXAMPLES = 3


@dataclass
class DataCounts:
    """Counts of the rows and of what happened to them; those of a stream grow while it is read."""

    rows: int = 0
    tokens: int = 0
    """Tokens before truncation."""
    truncated: int = 0
    """Rows longer than ``max_length``."""
    dropped: int = 0
    """Rows with nothing to train on within ``max_length``."""
    cut_tokens: int = 0
    divided: int = 0
    """Chats split into one row per answer, because their template renders an answer differently once others follow."""
    skipped: int = 0
    """Records that cannot be used."""
    reasons: list[str] = field(default_factory=list)
    """Why the first of these were skipped, with file and line."""
    shares: dict[str, int] = field(default_factory=dict)
    """The name of each of several sources, and the number of its rows in an epoch; empty for streams."""

    def __str__(self) -> str:
        parts = [f"{self.rows:,} rows, {self.tokens:,} tokens"]
        if self.truncated + self.dropped:
            parts.append(f"{self.truncated} of them truncated, {self.cut_tokens:,} tokens cut, {self.dropped} dropped")
        if self.divided:
            parts.append(
                f"{self.divided:,} chats split into one row per answer (the template renders an answer differently "
                "once others follow)"
            )
        if self.shares:
            parts.append("an epoch has " + ", ".join(f"{rows:,} of {name}" for name, rows in self.shares.items()))
        if self.skipped:
            more = ", ..." if self.skipped > len(self.reasons) else ""
            parts.append(f"{self.skipped:,} records skipped: {', '.join(self.reasons)}{more}")
        return "; ".join(parts)

    @classmethod
    def total(cls, parts: Sequence[DataCounts], shares: Sequence[tuple[str, int]] = ()) -> DataCounts:
        """Return the sum of the counts of several sources."""
        numbers = ("rows", "tokens", "truncated", "dropped", "cut_tokens", "divided", "skipped")
        return cls(
            **{name: sum(getattr(part, name) for part in parts) for name in numbers},
            reasons=[reason for part in parts for reason in part.reasons][:_EXAMPLES],
            shares=dict(shares),
        )

    def skip(self, error: DataError) -> None:
        """Count a record that cannot be used because of ``error``."""
        self.skipped += 1
        if len(self.reasons) < _EXAMPLES:
            self.reasons.append(error.found)

    def skip_also(self, other: DataCounts) -> None:
        """Add the records that ``other`` skipped."""
        self.skipped += other.skipped
        self.reasons = [*self.reasons, *other.reasons][:_EXAMPLES]


@dataclass(frozen=True)
class Limits:
    """Limits of a model's input; None where its config specifies none."""

    positions: int | None = None
    """Maximum number of tokens in a row."""
    embeddings: int | None = None
    """Number of token ids: 0 to this number minus 1."""

    def check(self, ids: Sequence[int], kept: int, where: str) -> None:
        """Raise DataError if the row of ``ids``, of which ``kept`` remain after truncation, is too long."""
        if self.positions is not None and kept > self.positions:
            raise DataError(
                f"{where} has {len(ids)} tokens, but the model has {self.positions} positions",
                expected=f"data.max_length of at most {self.positions}",
                fix="lower it, or extend the context with the plugin 'rope'",
            )


class UnknownTokens:
    """The tokens in the data that a model has no embedding for."""

    def __init__(self, limits: Limits, tokenizer: PreTrainedTokenizerBase) -> None:
        self.limits, self.tokenizer = limits, tokenizer
        self.found: dict[int, str] = {}
        """Token -> where it first occurred."""

    def add(self, ids: Sequence[int], where: str) -> None:
        """Add those among ``ids``, the tokens of a row after truncation."""
        rows = self.limits.embeddings
        if rows is not None and ids and max(ids) >= rows:
            for token in ids:
                if token >= rows:
                    self.found.setdefault(token, where)

    def check(self) -> None:
        """Raise DataError if there are any; the message counts them."""
        if not self.found:
            return
        names = [f"{self.tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in sorted(self.found)]
        more = f" and {len(names) - _EXAMPLES} others" if len(names) > _EXAMPLES else ""
        raise DataError(
            f"the model has no embedding for {len(names)} of the tokens in the data: {', '.join(names[:_EXAMPLES])}"
            f"{more}, first at {next(iter(self.found.values()))}",
            expected=f"tokens below {self.limits.embeddings}",
            fix="list them under data.new_tokens, which adds embeddings for them and trains these, or use the model's "
            "own tokenizer",
        )
