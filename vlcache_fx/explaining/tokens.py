"""What became of each token of a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from vlcache_fx.runtime.observation import Ranges, SampleObservation


class TokenClass(StrEnum):
    """What became of a token.

    Attributes:
        label: the class in words.
    """

    label: str

    def __new__(cls, value: str, label: str = "") -> Self:
        """Create a member with its label."""
        member = str.__new__(cls, value)
        member._value_, member.label = value, label
        return member

    TEXT = "text", "text, computed"
    PREFIX = "prefix", "exact prefix, reused exactly"
    REUSED = "reused", "image, reused"
    PARTLY = "partly", "image, recomputed in the first layers"
    RECOMPUTED = "recomputed", "image, recomputed"
    COMPUTED = "computed", "image, computed (no donor)"
    PADDING = "padding", "padding, not computed"
    UNMODIFIED = "unmodified", "computed in full"


MEDIA = frozenset({TokenClass.REUSED, TokenClass.PARTLY, TokenClass.RECOMPUTED, TokenClass.COMPUTED})
"""Classes of tokens of media items."""


@dataclass(frozen=True)
class TokenRange:
    """Consecutive tokens of one class, ``start`` to ``end`` (exclusive)."""

    kind: TokenClass
    start: int
    end: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.end - self.start


def classify(sample: SampleObservation) -> tuple[TokenRange, ...]:
    """Return what became of each token, as consecutive ranges from 0 to ``num_tokens``.

    Rows are nested: a token that the last layer computes is computed in all.
    """
    kinds = [TokenClass.TEXT] * sample.num_tokens
    computed, last = set(_tokens(sample.rows[0])), set(_tokens(sample.rows[:-1][-1]))
    for token in set(range(sample.num_tokens)) - computed:
        kinds[token] = TokenClass.PADDING
    for token in _tokens(sample.media):
        kinds[token] = TokenClass.COMPUTED
    for token in _tokens(sample.reused):
        kinds[token] = TokenClass.PARTLY if token in computed else TokenClass.REUSED
        if token in last:
            kinds[token] = TokenClass.RECOMPUTED
    kinds[: sample.prefix] = [TokenClass.PREFIX] * min(sample.prefix, sample.num_tokens)
    return ranges_of_kinds(kinds)


def unmodified(num_tokens: int) -> tuple[TokenRange, ...]:
    """Return the ranges of a prompt that the unmodified model computed."""
    return (TokenRange(TokenClass.UNMODIFIED, 0, num_tokens),) if num_tokens else ()


def ranges_of_kinds(kinds: Sequence[TokenClass]) -> tuple[TokenRange, ...]:
    """Return the ranges of a class per token."""
    found: list[TokenRange] = []
    start = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] is not kinds[start]:
            found.append(TokenRange(kinds[start], start, end))
            start = end
    return tuple(found)


def count(ranges: Iterable[TokenRange]) -> dict[TokenClass, int]:
    """Return the number of tokens of each class that occurs, in the order of ``TokenClass``."""
    counts: Counter[TokenClass] = Counter()
    for run in ranges:
        counts[run.kind] += run.length
    return {kind: counts[kind] for kind in TokenClass if counts[kind]}


def by_column(ranges: Sequence[TokenRange], columns: int) -> tuple[TokenRange, ...]:
    """Return ranges over ``columns`` columns of equal numbers of tokens, for drawings.

    A column has the class of most of its tokens, but a recomputed token is never hidden: few tokens are.
    """
    total = ranges[-1].end if ranges else 0
    tallies: list[Counter[TokenClass]] = [Counter() for _ in range(columns)]
    for run in ranges:
        for column in range(run.start * columns // total, (run.end * columns - 1) // total + 1):
            first, last = column * total / columns, (column + 1) * total / columns
            tallies[column][run.kind] += max(0.0, min(run.end, last) - max(run.start, first))  # type: ignore[assignment]
    kinds = [
        TokenClass.RECOMPUTED if tally[TokenClass.RECOMPUTED] else max(tally, key=lambda kind: tally[kind])
        for tally in tallies
    ]
    return ranges_of_kinds(kinds)


def _tokens(ranges: Ranges) -> Iterable[int]:
    return (token for start, end in ranges for token in range(start, end))
