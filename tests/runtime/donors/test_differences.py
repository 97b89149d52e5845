"""What differs between keys, in words, and the reason that follows."""

from __future__ import annotations

import pytest

from vlcache_fx.errors import Reason
from vlcache_fx.keys.entry_key import KeyScope
from vlcache_fx.runtime.donors.differences import differing_parts, distance, in_words, reason_of

DONOR = {
    "format": "1", "salt": "s", "model": "m", "content": "c", "weights": "w", "layout": "l", "numerics": "n",
    "computation": "k", "mask": "a", "positions": "p",
}  # fmt: skip
NOTES = {"encoder.content": "pixels", "encoder.fields": "grid", "encoder.settings": "e", "encoder.state": "t"}


@pytest.mark.parametrize(
    ("changes", "words", "reason"),
    [
        (["model", "weights"], ("decoder weights",), Reason.OTHER_WEIGHTS),
        (["weights", "computation"], ("decoder weights", "computation"), Reason.OTHER_WEIGHTS),
        (["numerics"], ("dtype or numeric mode",), Reason.OTHER_COMPUTATION),
        (["computation", "mask"], ("computation", "mask"), Reason.OTHER_COMPUTATION),
        (["positions"], ("positions",), Reason.OTHER_POSITIONS),
        (["mask"], ("mask",), Reason.OTHER_POSITIONS),
        (["salt"], ("salt",), Reason.NEW_ITEM),
        (["salt", "model"], ("decoder weights", "salt"), Reason.NEW_ITEM),
        (["format"], ("format of keys",), Reason.NOT_RECORDED),
        (["content", "encoder.content"], ("pixels",), Reason.NEW_ITEM),
        (["content", "encoder.fields"], ("grid",), Reason.OTHER_ENCODING),
        (["content", "encoder.settings"], ("processor settings",), Reason.OTHER_ENCODING),
        (["content", "encoder.state"], ("encoder weights",), Reason.OTHER_ENCODING),
        (["encoder.state"], (), Reason.NEW_ITEM),  # equal features: the encoder does not matter
    ],
)
def test_words_and_reason(changes: list[str], words: tuple[str, ...], reason: Reason) -> None:
    parts = {**DONOR, **NOTES}
    other = {name: f"{value}!" if name in changes else value for name, value in parts.items()}
    assert in_words(differing_parts(parts, other)) == words
    assert reason_of(parts, other) is reason
    assert reason_of(other, parts) is reason


def test_features_without_notes() -> None:
    (words,) = in_words(differing_parts(DONOR, {**DONOR, "content": "d"}))
    assert words == "features (pixels, grid, processor settings or encoder weights)"
    assert in_words({"content", "model"}, "features") == ("pixels", "encoder weights")


def test_parts_of_other_versions() -> None:
    assert in_words({"colour", "mask"}) == ("mask", "colour")
    assert differing_parts({"mask": "a", "colour": "b"}, {"mask": "a"}) == set()


def test_every_part_of_a_key_has_words() -> None:
    key = KeyScope("salt", "0" * 64).key("donor", dict.fromkeys(DONOR, "part"))
    assert all(in_words({name}) != (name,) or name in ("salt", "mask", "positions", "computation")
               for name in key.parts)  # fmt: skip


def test_same_features_are_nearest() -> None:
    parts = {**DONOR, **NOTES}
    same_features = {**parts, "model": "x", "weights": "x", "mask": "x"}
    same_pixels = {**parts, "content": "x", "encoder.fields": "x"}
    neither = {**parts, "content": "x", "encoder.content": "x"}
    ranked = sorted([neither, same_pixels, same_features], key=lambda other: distance(parts, other))
    assert ranked == [same_features, same_pixels, neither]
