"""Manifests: what was changed, moved or stored by others is noticed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.errors import DamagedEntryError
from vlcache_fx.keys.entry_key import KeyScope, Selection
from vlcache_fx.store import Entry
from vlcache_fx.store.mooncake.manifest import (
    LARGEST_RANK,
    Manifest,
    Part,
    decode,
    encode,
    key_of,
    manifest_name,
    patterns_of,
    rank_of,
    secret_check,
)

SECRET = b"s" * 32
PARTS = (Part("k.0", "bfloat16", (2, 3), "aa"), Part("v.0", "float32", (0,), "bb"))
MANIFEST = Manifest("key", 2, "0123", {"kind": "donor", "contexts": ["a", "b"]}, PARTS)


def test_manifests_survive_the_round_trip() -> None:
    assert decode(SECRET, "key", 2, encode(SECRET, MANIFEST)) == MANIFEST
    assert MANIFEST.nbytes == 12
    assert len(set(MANIFEST.names)) == 3


@pytest.mark.parametrize(
    ("secret", "key", "rank"), [(b"t" * 32, "key", 2), (SECRET, "other", 2), (SECRET, "key", 3)]
)
def test_manifests_belong_to_a_secret_and_a_name(secret: bytes, key: str, rank: int) -> None:
    with pytest.raises(DamagedEntryError, match="not stored with this secret"):
        decode(secret, key, rank, encode(SECRET, MANIFEST))


@given(st.data())
def test_changed_manifests_are_noticed(data: st.DataObject) -> None:
    whole = encode(SECRET, MANIFEST)
    index = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[index] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(changed), whole[:index]):
        with pytest.raises(DamagedEntryError):
            decode(SECRET, "key", 2, damaged)


@pytest.mark.parametrize(
    ("info", "rank"),
    [({}, 0), ({"contexts": None}, 0), ({"contexts": ["a"]}, 1), ({"contexts": ["a"] * 99}, LARGEST_RANK)],
)
def test_rank_counts_contexts(info: dict[str, object], rank: int) -> None:
    assert rank_of(Entry({}, info)) == rank  # type: ignore[arg-type]


def test_names_of_manifests_are_told_from_others() -> None:
    assert key_of(manifest_name("a.1", 3)) == ("a.1", 3)
    assert [key_of(name) for name in (*MANIFEST.part_names, "vlcache-secret", "of-others.1")] == [None] * 4


def test_patterns_match_what_is_selected() -> None:
    scopes = {salt: KeyScope(salt, "f" * 64) for salt in ("a", "b")}
    keys = {salt: scope.with_digest("donor", "0" * 64) for salt, scope in scopes.items()}
    names = {salt: replace(MANIFEST, key=key).names for salt, key in keys.items()}
    for selection, selected in [
        (None, {"a", "b"}),
        (Selection(salt="a"), {"a"}),
        (Selection(model="f" * 64), {"a", "b"}),
        (Selection(model="e" * 64), set()),
        (Selection(key=keys["b"]), {"b"}),
        (Selection(key="no key"), set()),
    ]:
        manifests, parts = patterns_of(selection)
        for salt, (first, *rest) in names.items():
            assert bool(re.search(manifests, first)) == (salt in selected)
            assert all(bool(re.search(parts, name)) == (salt in selected) for name in rest)
            assert not any(re.search(manifests, name) for name in rest)


def test_check_value_depends_on_the_secret() -> None:
    assert secret_check(SECRET) != secret_check(b"t" * 32)
    assert SECRET not in secret_check(SECRET)
    assert torch.Size(PARTS[1].shape).numel() == 0


@pytest.mark.parametrize(
    ("parts", "same"),
    [
        ((*PARTS, Part("v.0.left", "float32", (7, 2), "cc")), True),
        ((PARTS[0],), False),
        ((replace(PARTS[0], shape=(2, 4)), PARTS[1]), False),
    ],
)
def test_differences_do_not_change_the_layout(parts: tuple[Part, ...], same: bool) -> None:
    """So a donor of one context, which has none, replaces no better donor."""
    assert MANIFEST.has_layout_of(replace(MANIFEST, parts=parts)) is same
