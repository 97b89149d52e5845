"""Which parts of two keys differ, in words."""

from __future__ import annotations

from collections.abc import Mapping

from vlcache_fx.errors import Reason

WORDS = {
    "encoder.content": "pixels",
    "encoder.fields": "grid",
    "encoder.settings": "processor settings",
    "encoder.model": "encoder weights",
    "encoder.state": "encoder weights",
    "encoder.computation": "encoder",
    "encoder.modality": "modality",
    "encoder.numerics": "dtype or numeric mode of the encoder",
    "content": "features (pixels, grid, processor settings or encoder weights)",
    "fields": "grid",
    "settings": "processor settings",
    "state": "encoder weights",
    "modality": "modality",
    "model": "decoder weights",
    "weights": "decoder weights",
    "salt": "salt",
    "numerics": "dtype or numeric mode",
    "layout": "dtype or width of rows",
    "stored_as": "donor dtype",
    "computation": "computation",
    "positions": "positions",
    "mask": "mask",
    "range": "text that its tokens attend to",
    "format": "format of keys",
}
"""Parts of keys, and notes, in words, in the order in which explanations name them."""

OF_FEATURES = {"content": "pixels", "model": "encoder weights"}
"""Words for keys of features, where they differ from those for donors."""


def differing_parts(parts: Mapping[str, str], other: Mapping[str, str]) -> set[str]:
    """Return the names of parts that both keys have, with different digests.

    Where features differ, notes say why; where they are equal, the encoder does not matter.
    """
    names = {name for name in parts.keys() & other.keys() if parts[name] != other[name]}
    notes = {name for name in names if name.startswith("encoder.")}
    if "content" not in names:
        return names - notes
    return names - {"content"} if notes else names


def in_words(names: set[str], kind: str = "donor") -> tuple[str, ...]:
    """Return names of parts in words, each once; parts of other versions by their name.

    Args:
        names: names of parts.
        kind: kind of the keys.
    """
    known = [name for name in WORDS if name in names]
    own = OF_FEATURES if kind == "features" else {}
    return tuple(
        dict.fromkeys(
            own.get(name, WORDS.get(name, name)) for name in [*known, *sorted(names - WORDS.keys())]
        )
    )


def distance(parts: Mapping[str, str], other: Mapping[str, str]) -> tuple[int, int]:
    """Return how far two keys are: 0, 1, 2 for equal features, pixels, none of them; then differing parts."""
    shares = [name in parts and parts[name] == other.get(name) for name in ("content", "encoder.content")]
    subject = 0 if shares[0] else 1 if shares[1] else 2
    return subject, len(differing_parts(parts, other))


def reason_of(parts: Mapping[str, str], other: Mapping[str, str]) -> Reason:
    """Return the reason of a miss, given the key with the least distance. Another salt counts as new."""
    names, (subject, _) = differing_parts(parts, other), distance(parts, other)
    if subject == 2 or "salt" in names:
        return Reason.NEW_ITEM
    if "format" in names:
        return Reason.NOT_RECORDED
    if subject == 1:
        return Reason.OTHER_ENCODING
    if names & {"model", "weights"}:
        return Reason.OTHER_WEIGHTS
    if names == {"range"}:
        return Reason.OTHER_TEXT
    if names <= {"positions", "mask", "range"}:
        return Reason.OTHER_POSITIONS if names else Reason.NEW_ITEM
    return Reason.OTHER_COMPUTATION
