"""``Profile``: checks, and JSON files."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlcache_fx.errors import PolicyError
from vlcache_fx.policies import Profile


def test_profile_save_and_load(tmp_path: Path) -> None:
    profile = Profile("abc", "bfloat16", (0.5, 1.0, 0.0))
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


def test_curves_by_contexts(tmp_path: Path) -> None:
    one, two, eight = (((0.0, error), (1.0, 0.0)) for error in (0.4, 0.3, 0.1))
    profile = Profile("abc", "bfloat16", (1.0,), one, ((2, two), (8, eight)), 16)
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    expected = {1: one, 2: two, 7: two, 8: eight, 20: eight}
    assert {count: profile.for_contexts(count).error_curve for count in expected} == expected
    assert profile.for_contexts(3).for_contexts(8).error_curve == two


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        (((1, ((0.0, 1.0), (1.0, 0.0))),), "pairs"),
        (((2.5, ()),), "pairs"),
        ((2, 3), "pairs"),
        (((4, ()), (2, ())), "must rise"),
        (((2, ((0.0, 1.0),)),), "from 0 to 1"),
    ],
)
def test_bad_curves_by_contexts(curves: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Profile("abc", "float32", (1.0,), curves_by_contexts=curves)


@pytest.mark.parametrize("rank", [-1, 1.5, True, None])
def test_bad_donor_rank(rank: Any) -> None:
    with pytest.raises(PolicyError, match="donor_rank must be an integer >= 0"):
        Profile("abc", "float32", (1.0,), donor_rank=rank)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"model_fingerprint": "abc", "dtype": "float32"}',
        '{"model_fingerprint": "abc", "dtype": "float32", "sensitivities": [1], "more": 1}',
        '{"model_fingerprint": 3, "dtype": "float32", "sensitivities": [1]}',
        '{"model_fingerprint": "abc", "dtype": "float32", "sensitivities": []}',
        '{"model_fingerprint": "abc", "dtype": "float32", "sensitivities": "12"}',
        '{"model_fingerprint": "abc", "dtype": "float32", "sensitivities": [1, -1]}',
        '{"model_fingerprint": "abc", "dtype": "float32", "sensitivities": [NaN]}',
        '{"model_fingerprint": "abc", "dtype": "float32", "sensitivities": [true]}',
    ],
)
def test_profile_load_invalid(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(PolicyError, match="profile"):
        Profile.load(path)


def test_profile_load_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"nowhere\.json"):
        Profile.load(tmp_path / "nowhere.json")


def test_profile_values_are_floats_without_alias() -> None:
    values: Any = [1, 2]
    profile = Profile("abc", "float32", values)
    values.append(3)
    assert profile.sensitivities == (1.0, 2.0)
    assert json.dumps(profile.sensitivities) == "[1.0, 2.0]"
