"""``vlcache policies``."""

import json

import pytest

from vlcache_fx.errors import PolicyError
from vlcache_fx.policies import known_policies

from .helpers import failure, run


def test_policies_lists_names_and_summaries() -> None:
    output = run("policies")
    for name, entry in known_policies().items():
        assert name in output
        assert entry.value in output
    assert "All rows in all layers" in output


def test_policies_as_json() -> None:
    found = json.loads(run("policies", "--json"))
    assert {one["name"]: one["implementation"] for one in found} == {
        name: entry.value for name, entry in known_policies().items()
    }
    assert next(one for one in found if one["name"] == "full")["recomputes"].startswith("All rows in all")


def test_policies_error_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise PolicyError("two policies are named 'x'")

    monkeypatch.setattr("vlcache_fx.policies.known_policies", fail)
    assert "error: two policies are named 'x'" in failure("policies")
