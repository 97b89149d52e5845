"""Explanations of misses, for operators: the nearest entry, and what differs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from vlcache_fx.errors import Reason
from vlcache_fx.keys.entry_key import NO_PARTS, TAG_LENGTH
from vlcache_fx.runtime.donors.differences import (
    differing_parts,
    distance,
    in_words,
    reason_of,
)
from vlcache_fx.runtime.donors.miss_log import Miss, MissLog, with_eviction
from vlcache_fx.store.base import EntryInfo, Eviction, Store

KEY = re.compile(rf"([a-z]+)-([0-9a-f]{{{TAG_LENGTH}}})-([0-9a-f]{{{TAG_LENGTH}}})-([0-9a-f]{{64}})")
"""Kind, salt, model and digest of a key."""


@dataclass(frozen=True)
class MissExplanation:
    """Why a key was not found.

    Attributes:
        key: the key.
        reason: the reason, at least as exact as that of the report; None if the entry is there.
        detail: details, such as the slot that does not fit; may be empty.
        differs: what differs from the nearest key, in words such as ``pixels`` and ``decoder weights``.
        nearest: the nearest key, of any salt; None if there is none, or if it does not matter.
        nearest_tier: tier of its entry; None if it was looked up, but is not stored.
        eviction: when and why the entry was dropped, and for which key; None if unknown.
        sample: index of the span's sample; None without a report.
        start: first token of the span; None without a report.
    """

    key: str
    reason: Reason | None
    detail: str = ""
    differs: tuple[str, ...] = ()
    nearest: str | None = None
    nearest_tier: str | None = None
    eviction: Eviction | None = None
    sample: int | None = None
    start: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the explanation as JSON-serialisable data."""
        return asdict(self)

    def __str__(self) -> str:
        at = "" if self.start is None else f"the span at token {self.start} of sample {self.sample}: "
        if self.reason is None:
            return f"{at}{shortened(self.key)} is stored."
        if self.eviction is not None:
            return f"{at}{shortened(self.key)} was dropped {_circumstances(self.eviction)}."
        detail = f" ({self.detail})" if self.detail else ""
        text = f"{at}{shortened(self.key)} was not found: {self.reason.text}{detail}"
        if self.nearest is None:
            return f"{text}."
        where = "not stored now" if self.nearest_tier is None else f"in the {self.nearest_tier} tier"
        words = ", ".join(self.differs) or "nothing that its key names"
        return f"{text}; the nearest key, {shortened(self.nearest)} ({where}), differs in: {words}."


@dataclass(frozen=True)
class _Candidate:
    key: str
    parts: Mapping[str, str]
    tier: str | None


def explain_key(
    key: str, store: Store, log: MissLog | None = None, miss: Miss | None = None
) -> MissExplanation:
    """Explain why a key is not found; reads the listing of the store, but no tensor.

    Args:
        key: a key.
        store: the store.
        log: recent lookups and misses. With it, the latest miss is explained, even if the entry is there now.
        miss: the miss to explain; by default the latest in ``log``, else that of a lookup now.

    Raises:
        StoreError: the store cannot be read.
    """
    lookup = None if log is None else log.lookups.get(key)
    miss = log.get(key) if miss is None and log is not None else miss
    if miss is None:
        # Tiers behind a network answer listings, but not ``in``.
        if key in store or any(entry.key == key for entry in store.entries()):
            return MissExplanation(key, None)
        miss = with_eviction(Reason.NEW_ITEM, store.evicted(key))
    explanation = MissExplanation(key, miss.reason, miss.detail, eviction=miss.eviction)
    if miss.eviction is not None or miss.reason in _NEEDS_NO_NEIGHBOUR:
        return explanation
    candidates = list(_stored(key, store))
    if log is not None and lookup is not None:
        # What was looked up first in this call or later cannot explain the miss.
        numbers = ((one, log.lookups.get(one.key)) for one in candidates)
        candidates = [one for one, known in numbers if known is None or known.number < lookup.number]
        stored = {one.key for one in candidates}
        earlier = (one for one in log.lookups.before(lookup.number) if one.key not in stored)
        candidates += [_Candidate(one.key, one.parts, None) for one in earlier]
    return _with_nearest(explanation, NO_PARTS if lookup is None else lookup.parts, candidates)


_NEEDS_NO_NEIGHBOUR = {
    Reason.NOT_RECORDED,
    Reason.TOO_LARGE,
    Reason.STORE_CLOSED,
    Reason.STORE_FAILED,
    Reason.INCOMPATIBLE_ENTRY,
    Reason.EVICTED,
    Reason.DAMAGED_ENTRY,
    Reason.RECOMPUTED_TO_RECORD,
    Reason.RECOMPUTED_TO_REFINE,
}


def explain_spans(
    spans: Iterable[Mapping[str, Any]], store: Store, log: MissLog
) -> Iterator[MissExplanation]:
    """Explain each span of a report that missed.

    Raises:
        StoreError: the store cannot be read.
    """
    for span in spans:
        if not span["hit"] and span["miss_reason"] is not None:
            logged, miss = log.get(span["key"]), Miss(Reason(span["miss_reason"]), span["miss_detail"])
            if logged is not None and logged.reason is miss.reason:
                miss = logged  # also has the eviction
            found = explain_key(span["key"], store, log, miss)
            yield replace(found, sample=span["sample"], start=span["start"])


def notes_of(entry: EntryInfo) -> dict[str, str]:
    """Return what an entry's key covers and what explains its features, by name, from a listing."""
    found: dict[str, str] = {}
    for name in ("parts", "notes"):
        value = entry.info.get(name)
        if isinstance(value, dict):
            found |= {str(part): str(digest) for part, digest in value.items()}
    return found


def shortened(key: str) -> str:
    """Return a key with 12 digits of its digest, for texts."""
    match = KEY.fullmatch(key)
    return f"{match[1]} {match[4][:12]}" if match else repr(key)


def _stored(key: str, store: Store) -> Iterator[_Candidate]:
    kind = key.partition("-")[0]
    for entry in store.entries():
        if entry.key.partition("-")[0] == kind and entry.key != key:
            yield _Candidate(entry.key, notes_of(entry), entry.tier)


def _with_nearest(
    explanation: MissExplanation, parts: Mapping[str, str], candidates: list[_Candidate]
) -> MissExplanation:
    """Return the explanation with the nearest candidate; of equal ones, the latest."""
    key = explanation.key
    if not parts:  # all that is known is in the key
        parts = tags(key)
        candidates = [_Candidate(one.key, tags(one.key), one.tier) for one in candidates]
    if not parts or not candidates:
        return explanation
    nearest = min(reversed(candidates), key=lambda one: distance(parts, one.parts))
    reason = reason_of(parts, nearest.parts)
    return MissExplanation(
        key,
        explanation.reason if reason is Reason.NEW_ITEM else reason,
        explanation.detail,
        in_words(differing_parts(parts, nearest.parts), key.partition("-")[0]),
        nearest.key,
        nearest.tier,
    )


def tags(key: str) -> dict[str, str]:
    """Return the parts that a key itself names: the tags of its salt and its model."""
    match = KEY.fullmatch(key)
    return {"salt": match[2], "model": match[3]} if match else {}


def _circumstances(eviction: Eviction) -> str:
    at = datetime.fromtimestamp(eviction.evicted_at, UTC)
    cause = {"capacity": "to make room", "cleared": "by clear()", "damaged": "as its bytes were damaged"}
    why = cause.get(eviction.cause, eviction.cause)
    for_key = f" for {shortened(eviction.for_key)}" if eviction.for_key else ""
    return f"from the {eviction.tier} tier at {at:%Y-%m-%d %H:%M:%S} UTC {why}{for_key}"
