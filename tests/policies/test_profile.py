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
